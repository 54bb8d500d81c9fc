"""`drive_tensorboard.py OUTPUT_DIR LAST_STEP`: logs steps and is killed after the last."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from collie_core.config.schema import CollieConfig
from collie_core.run import Run
from collie_monitors.tensorboard_monitor import TensorBoard

output_dir, last = Path(sys.argv[1]), int(sys.argv[2])
config = CollieConfig(model={"path": "some/model"}, output_dir=output_dir)
run = Run(config, output_dir, device="cpu", total_steps=40)  # type: ignore[arg-type]  # torch is not needed here
monitor = TensorBoard(TensorBoard.Options()).collie_monitor(run)
for step in range(1, last + 1):
    monitor.log(step, {"step": step, "loss": 1 / step})
os.kill(os.getpid(), signal.SIGKILL)
