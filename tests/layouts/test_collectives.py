"""Collectives between tensor-parallel ranks."""

from __future__ import annotations

import subprocess
import sys

MANY_AT_A_TIME = """
import threading
import torch, torch.distributed as dist
from collie_core.layouts.collectives import gather_sequence, reduce_scatter_sequence

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
x = torch.arange(24.0).view(2, 3, 4)
equal = []

def run():
    for _ in range(10_000):
        whole = gather_sequence(x, dist.group.WORLD)
        equal.append(torch.equal(reduce_scatter_sequence(whole, dist.group.WORLD), x))

threads = [threading.Thread(target=run) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert len(equal) == 20_000 and all(equal)
dist.destroy_process_group()
"""


def test_operations_that_end_at_the_same_time_leave_memory_whole() -> None:
    """Threads of gloo share the name of the last one; a long one ended in a crash within seconds."""
    done = subprocess.run([sys.executable, "-c", MANY_AT_A_TIME], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
