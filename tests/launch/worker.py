"""A process of a job: steps that end in a sum over all, and on rank 1 something that goes wrong.

worker.py STEPS [CODE]: CODE is run by rank 1 in its fourth step.
"""

from __future__ import annotations

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from collie_core.errors import DataError, OutOfMemory  # noqa: F401  (for CODE)
from collie_core.launch import close_process_group, current_world, local_device, open_process_group
from collie_core.launch.rank import as_rank, final_status
from collie_core.train.signals import StopSignals


def work(steps: int, code: str) -> int:
    world = current_world()
    device = local_device(world)
    open_process_group(world, device, timeout_s=300)
    try:
        with StopSignals() as signals:
            for step in range(steps):
                if world.rank == 1 and step == 3:
                    exec(code)
                flag = torch.tensor(float(signals.received or 0), device=device)
                dist.all_reduce(flag, op=dist.ReduceOp.MAX)
                if flag:
                    time.sleep(float(os.environ.get("SAVE_SECONDS", "0")) if world.rank == 0 else 0)
                    dist.all_reduce(flag)  # the others wait for the save in a collective
                    print(f"saved after {step}", flush=True)
                    return 128 + int(signals.received or signal.SIGTERM)
                time.sleep(0.02)
                print(f"step {step}", flush=True)
        return 0
    finally:
        close_process_group()


if __name__ == "__main__":
    this = current_world()
    with as_rank(this):
        status = work(int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "")
    sys.exit(final_status(this, status))
