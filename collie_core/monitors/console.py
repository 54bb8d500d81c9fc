"""The monitor `console`: progress on stderr, as a live bar on a terminal and as plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge

from collie_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from rich.progress import Progress

    from collie_core.run import Run

LINES_A_RUN = 20  # plain lines are printed at least so often in a run,
SECONDS_A_LINE = 60.0  # and at least once in so many seconds
SECONDS_A_REFRESH = 0.25  # of the live bar


class Console:
    """Loss, learning rate, speed, remaining time and memory of a run on stderr."""

    collie_api = 1

    @dataclass(frozen=True)
    class Options:
        """every_steps: print a line at every multiple of it, on a terminal too (above the bar).

        null: twenty lines a run, or one a minute if that is more; on a terminal none, for the bar has it all.
        """

        every_steps: Annotated[int, Ge(1)] | None = None

    def __init__(self, options: Options) -> None:
        self._options = options
        self._monitor: ConsoleMonitor | None = None

    @hookimpl
    def collie_monitor(self, run: Run) -> ConsoleMonitor:
        """The monitor; the bar appears when training starts."""
        self._monitor = ConsoleMonitor(run, self._options.every_steps)
        return self._monitor

    @hookimpl
    def collie_run_start(self) -> None:
        """Show the bar, where stderr is a terminal."""
        if self._monitor:
            self._monitor.start()

    @hookimpl
    def collie_checkpoint_saved(self, path: Path) -> None:
        """Say where the checkpoint is."""
        if self._monitor:
            self._monitor.print(f"checkpoint saved: {path}")

    @hookimpl
    def collie_exported(self, path: Path) -> None:
        """Say where the model is."""
        if self._monitor:
            self._monitor.print(f"model written: {path}")


class ConsoleMonitor:
    """Prints what is logged."""

    def __init__(self, run: Run, every_steps: int | None) -> None:
        self._run = run
        self._every_steps = every_steps
        self._first_step = run.step
        self._started = self._last_line = time.monotonic()
        self._refreshed = 0.0
        self._latest: dict[str, float] = {}
        self._bar: Progress | None = None

    def start(self) -> None:
        """Begin to count the time; on a terminal, show the bar."""
        run = self._run
        begin = f"resuming after step {run.step:,} of" if run.step else "training"
        self.print(f"{run.output_dir}: {begin} {run.total_steps:,} steps")
        self._started = self._last_line = time.monotonic()
        if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            self._bar = _live_bar(run)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the figures of a step now and then, those of an evaluation always."""
        self._latest.update(metrics)
        if "loss" not in metrics:
            figures = "  ".join(f"{key} {figure(value)}" for key, value in metrics.items())
            self.print(f"step {step:,}  {figures}")
            return
        if self._due(step):
            self._last_line = time.monotonic()
            self.print(f"step {step:,}/{self._run.total_steps:,}  {self._figures(step, metrics)}")
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=step, figures=self._figures(step, metrics))
            now = time.monotonic()
            if now - self._refreshed >= SECONDS_A_REFRESH or step == self._run.total_steps:
                self._refreshed = now
                self._bar.refresh()

    def text(self, step: int, key: str, value: str) -> None:
        """Print the text under its key."""
        self.print(f"step {step:,}  {key}:\n{value}")

    def close(self, error: BaseException | None) -> None:
        """Remove the bar and sum the run up."""
        if self._bar:
            self._bar.stop()
            self._bar = None
        run, seconds = self._run, time.monotonic() - self._started
        how = f"stopped after step {run.step:,} of {run.total_steps:,}"
        if error is not None:
            how = f"failed after step {run.step:,} ({type(error).__name__})"
        elif run.stop_reason:
            how += f" ({run.stop_reason})"
        elif run.step >= run.total_steps:
            how = "finished"
        last = "".join(
            f", {key} {figure(value)}"
            for key, value in self._latest.items()
            if key in ("loss", "perplexity/perplexity")
        )
        self.print(f"{how}: {run.step - self._first_step:,} steps in {duration(seconds)}{last}")

    def print(self, line: str) -> None:
        """A line on stderr, above the bar where there is one."""
        if self._bar:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def _due(self, step: int) -> bool:
        if self._every_steps:
            return step % self._every_steps == 0
        if self._bar:
            return False
        total = self._run.total_steps
        return (
            step in (self._first_step + 1, total)
            or step % max(1, total // LINES_A_RUN) == 0
            or time.monotonic() - self._last_line >= SECONDS_A_LINE
        )

    def _figures(self, step: int, metrics: Mapping[str, float]) -> str:
        """The figures of a step that fit in a line."""
        elapsed = time.monotonic() - self._started
        remaining = elapsed / max(1, step - self._first_step) * max(0, self._run.total_steps - step)
        shown = [text(metrics[key]) for key, text in STEP_FIGURES.items() if key in metrics]
        return "  ".join([*shown, f"eta {duration(remaining)}"])


def figure(value: float) -> str:
    """A count with thousands apart, anything else to four digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:#.4g}"


def amount(value: float) -> str:
    """Three digits or so and k, M or G: `12.3k`."""
    for unit in ("", "k", "M"):
        if abs(value) < 1000:
            return f"{value:.1f}{unit}" if unit or value < 100 else f"{value:.0f}"
        value /= 1000
    return f"{value:.1f}G"


def duration(seconds: float) -> str:
    """`h:mm:ss`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}"


#: what is shown of a step, and how
STEP_FIGURES: dict[str, Callable[[float], str]] = {
    "loss": lambda loss: f"loss {loss:#.4g}",
    "lr": lambda lr: f"lr {lr:.2e}",
    "tokens_per_second": lambda speed: f"{amount(speed)} tokens/s",
    "peak_memory_gib": lambda memory: f"{memory:.2f} GiB",
}


def _live_bar(run: Run) -> Progress:
    """A started bar; it is drawn again when told to, so that no thread runs beside the training."""
    from rich import console, progress

    bar = progress.Progress(
        progress.BarColumn(bar_width=24),
        progress.TextColumn("{task.completed:,.0f}/{task.total:,.0f}  {task.fields[figures]}", markup=False),
        console=console.Console(stderr=True),
        auto_refresh=False,
        redirect_stdout=False,
    )
    bar.add_task("", total=run.total_steps, completed=run.step, figures="")
    bar.start()
    return bar
