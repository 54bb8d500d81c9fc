"""`drive_console.py OUTPUT_DIR`: a short run on the terminal that stderr is, at one width after the other."""

from __future__ import annotations

import fcntl
import struct
import sys
import termios
import time
from pathlib import Path

from collie_core.config.schema import CollieConfig
from collie_core.monitors.console import Console
from collie_core.run import Run

output_dir = Path(sys.argv[1])
config = CollieConfig(model={"path": "some/model"}, output_dir=output_dir)
run = Run(config, output_dir, device="cpu", total_steps=8)  # type: ignore[arg-type]  # torch is not needed here
plugin = Console(Console.Options(every_steps=6))
monitor = plugin.collie_monitor(run)
plugin.collie_run_start()
for step, width in enumerate((200, 80, 40, 10, 2, 1, 0, 200), start=1):
    fcntl.ioctl(2, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    time.sleep(0.26)  # the bar is drawn four times a second
    figures = {"loss": 1 / step, "lr": 1e-4, "tokens_per_second": 12345.6, "peak_memory_gib": 1.5}
    monitor.log(step, {"step": step, **figures})
    if step == 1:
        monitor.log(step, {"perplexity/perplexity": 7.25, "perplexity/tokens": 123456})
        print("a warning of some library", file=sys.stderr)
        print("a result")
        plugin.collie_checkpoint_saved(output_dir / "checkpoints" / "step_000004")
    run.step = step
monitor.text(8, "sample", "[bold]not markup[/bold]")
monitor.close(None)
