"""`drive_wandb.py OUTPUT_DIR FIRST LAST ENDING OPTIONS`: a run from a checkpoint after FIRST steps to LAST.

ENDING is finish, fail or kill, OPTIONS the monitor's as JSON.  As in a real run, metrics.jsonl comes first.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from collie_core.config.schema import CollieConfig
from collie_core.monitors.metrics_file import MetricsFile
from collie_core.run import Run
from collie_monitors.wandb_monitor import WandB

BLOCK = 32 * 1024  # W&B writes its file in blocks: two hundred steps make one

output_dir, first, last, ending = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
options = json.loads(sys.argv[5])
output_dir.mkdir(exist_ok=True)
config = CollieConfig(model={"path": "some/model"}, output_dir=output_dir, seed=7)
run = Run(config, output_dir, device="cpu", step=first, total_steps=1000)  # type: ignore[arg-type]  # needs no torch
metrics_file = MetricsFile(output_dir / "metrics.jsonl")
metrics_file.truncate_after(first)
monitor = WandB(WandB.Options(**options)).collie_monitor(run)


def log(step: int, metrics: Mapping[str, float]) -> None:
    metrics_file.append({"step": step, **metrics})
    monitor.log(step, metrics)


for step in range(first + 1, last + 1):
    log(step, {"step": step, "loss": 1 / step, "grad_norm": float("nan") if step == 3 else 0.5})
    if step % 5 == 0:
        log(step, {"perplexity/perplexity": abs(step - 10) + 2.0})
    run.step = step
monitor.text(last, "sample", "a [sample] of text")
if ending == "kill":
    [file] = (output_dir / "wandb" / "latest-run").glob("*.wandb")
    while last - first > 200 and file.stat().st_size < BLOCK:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
monitor.close(RuntimeError("no more") if ending == "fail" else None)
