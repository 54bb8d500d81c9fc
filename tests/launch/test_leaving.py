"""How a process of a job ends when its work is done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from typing import Any

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

FAILS = """
import atexit, time
atexit.register(time.sleep, 300)  # as native code that waits for a collective
from collie_core.launch import peers
from collie_core.launch.world import current_world

joined = peers.join(current_world())
try:
    raise RuntimeError("out of memory")
except RuntimeError as error:
    joined.leave(error)
    raise
"""


def leave(script: str, store: TCPStore, attempt: int) -> subprocess.CompletedProcess[str]:
    """Run a script as the only process of a job."""
    environment: dict[str, Any] = {
        **os.environ,
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)},
        **{"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
        "TORCHELASTIC_RESTART_COUNT": str(attempt),
    }
    return subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120
    )


def job_store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=60), wait_for_workers=False)


def test_a_heart_that_beats_at_the_end_aborts_nothing() -> None:
    store = job_store()
    for attempt in range(4):
        done = leave(LEAVES, store, attempt)
        assert done.returncode == 0, done.stderr


def test_a_failed_process_is_gone_though_something_waits_at_its_end() -> None:
    begin = time.monotonic()
    done = leave(FAILS, job_store(), 0)
    assert "RuntimeError: out of memory" in done.stderr
    assert done.returncode == -signal.SIGALRM
    assert time.monotonic() - begin < 30
