"""How a process of a job ends when its work is done."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta

from torch.distributed import TCPStore

LEAVES = """
import time
from collie_core.launch import peers
from collie_core.launch.world import current_world

peers.BEAT_S = 0.0  # it is always in a call of the store
joined = peers.join(current_world())
time.sleep(0.2)
joined.leave(None)
"""


def test_a_heart_that_beats_at_the_end_aborts_nothing() -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=60), wait_for_workers=False)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    for attempt in range(4):
        environment = {**os.environ, **place, **one, "TORCHELASTIC_RESTART_COUNT": str(attempt)}
        done = subprocess.run(
            [sys.executable, "-c", LEAVES], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
