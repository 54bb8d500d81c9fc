"""Everything a run holds once it is set up, and the things done with it between steps."""

from __future__ import annotations

import resource
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collie_core.checkpoint.manager import CheckpointManager
    from collie_core.data.reader import DataReader
    from collie_core.hookspecs import Layout, ModelProvider, Monitor
    from collie_core.monitors.metrics_file import MetricsFile
    from collie_core.registry import RunPlugins
    from collie_core.run import Run
    from collie_core.train.evaluation import Evaluator
    from collie_core.train.signals import StopSignals


@dataclass(frozen=True)
class Stop:
    """What the processes agreed on: true where the run ends, by a signal or because it was asked to.

    memory: the highest peak memory of any of them, GiB.
    """

    signal: signal.Signals | None = None
    asked: bool = False
    memory: float = 0.0

    def __bool__(self) -> bool:
        return self.signal is not None or self.asked


@dataclass
class Session:
    """One process's run.

    position: the reader's state after the last finished step.  stop: the last agreement.
    saved: the step of the newest checkpoint, 0 where there is none.  done: an earlier start did all of it.
    noted: what `run.json` says of `run.resolved`.
    """

    run: Run
    plugins: RunPlugins
    provider: ModelProvider
    layout: Layout
    reader: DataReader
    evaluators: dict[str, Evaluator]
    base_lr: float
    checkpoints: CheckpointManager
    data_fingerprint: str
    metrics_file: MetricsFile
    monitors: list[Monitor] = field(default_factory=list)
    position: Any = None
    last_evaluation: dict[str, float] = field(default_factory=dict)
    stop: Stop = field(default_factory=Stop)
    saved: int = 0
    done: bool = False
    noted: dict[str, Any] = field(default_factory=dict)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line in metrics.jsonl, and to every monitor; the first process's business."""
        if not self.run.first:
            return
        self.metrics_file.append({"step": step, **metrics})
        for monitor in list(self.monitors):
            self._tell(monitor, partial(monitor.log, step, metrics))

    def text(self, key: str, value: str) -> None:
        """A piece of text to every monitor."""
        for monitor in list(self.monitors):
            self._tell(monitor, partial(monitor.text, self.run.step, key, value))

    def _tell(self, monitor: Monitor, call: Callable[[], None]) -> None:
        """Call a monitor; one that fails is reported once, closed and dropped, and the run goes on."""
        try:
            call()
        except (Exception, SystemExit) as error:  # a library that exits must not end the run either
            self._report(type(monitor).__name__, error)
            self.monitors.remove(monitor)
            with suppress(Exception, SystemExit):
                monitor.close(error)

    def _report(self, name: str, error: BaseException) -> None:
        self.warn(f"monitor {name} failed and is dropped: {type(error).__name__}: {error}")

    def evaluate(self) -> dict[str, float]:
        """Run every evaluator on the evaluation data; results under `<evaluator>/<figure>`."""
        from collie_core.train.evaluation import run_evaluators

        if not self.evaluators:
            return {}
        run = self.run
        self.plugins.broadcast("collie_evaluate_start", run=run, step=run.step)
        results = run_evaluators(self.evaluators, self.layout)
        self.log(run.step, results)
        self.last_evaluation = results
        self.plugins.broadcast("collie_evaluate_end", run=run, step=run.step, metrics=results)
        return results

    def save(self) -> None:
        """Write the checkpoint of the current step, in the background where the config says so.

        Nothing where it is there already.
        """
        from collie_core.train.output import checkpoint_state, write_model_files

        if self.saved == self.run.step:
            return
        self.settle()
        run, background = self.run, self.run.config.checkpoint.async_save
        self.plugins.broadcast("collie_checkpoint_saving", run=run, step=run.step)
        write_tensors = self._copied() if background else self.layout.save

        def write(folder: Path) -> None:
            write_tensors(folder)
            if run.first:
                write_model_files(run, folder / "model_files")

        state = checkpoint_state(run, self.position, self.data_fingerprint)
        path = self.checkpoints.save(run.step, write, state, background=background)
        self.saved = run.step
        if not background:
            self._saved(path)

    def _copied(self) -> Callable[[Path], None]:
        """A function that writes the tensors as they are now."""
        from collie_core.checkpoint.store import TensorSave

        saving = TensorSave(self.layout.state(), self.checkpoints.group, copy=True)
        return lambda folder: saving.finish(folder, lambda: saving.write(folder))

    def settle(self, wait: bool = True) -> None:
        """Hear of a save in the background, waiting for it if `wait`; raises its error."""
        if wait or self.checkpoints.finished():
            path = self.checkpoints.wait()
            if path is not None:
                self._saved(path)

    def _saved(self, path: Path) -> None:
        self.plugins.broadcast("collie_checkpoint_saved", run=self.run, step=self.saved, path=path)

    def agree(self, signals: StopSignals) -> Stop:
        """Let every process know what one was told; all return the same, which alone decides what is done.

        A signal or a `run.stop` that comes later counts the next time.
        """
        from collie_core.together import highest

        run = self.run
        received = float(signals.received) if signals.received is not None else 0.0
        asked = float(run.stop_reason is not None)
        number, stopped, memory = highest([received, asked, self.peak_memory_gib()], run.control)
        if stopped:
            run.stop("another process of the run asked for it")
        self.stop = Stop(signal.Signals(int(number)) if number else None, bool(stopped), memory)
        self.settle(wait=False)
        return self.stop

    def start(self) -> None:
        """Open the output folder and the monitors; from here on the run writes."""
        from collie_core.train.output import write_config

        run = self.run
        if not run.first:
            return
        write_config(run)
        self._write_run_json()
        self.metrics_file.truncate_after(run.step)
        self.checkpoints.set_aside_after(run.step)
        run.show = self.text
        for plugin in self.plugins.of_kind("monitor"):
            try:
                self.monitors.append(self.plugins.call_one(plugin, "collie_monitor", run=run))
            except Exception as error:
                self._report(plugin.label, error)

    def note_choices(self) -> None:
        """`run.json` again where a step has resolved something."""
        if self.run.first and self.run.resolved != self.noted:
            self._write_run_json()

    def _write_run_json(self) -> None:
        from collie_core.train.output import write_run_json

        self.noted = deepcopy(self.run.resolved)
        write_run_json(self.run, self.plugins)

    def finish(self) -> None:
        """The export: the model in Hugging Face layout, or the adapters in that of their libraries."""
        from collie_core.train.output import export_adapters, export_final

        run = self.run
        self.settle()
        self.note_choices()
        if run.added:
            path = export_adapters(run, self.layout)
        else:
            path = export_final(run, self.provider, self.layout)
        self.plugins.broadcast("collie_exported", run=run, path=path)

    def fail(self, error: BaseException) -> None:
        """Tell everyone that the run ends by `error`, the other processes first: they may be waiting for us.

        A save in the background is finished before, unless a process is gone that it would wait for.
        """
        from collie_core.launch.failure import is_consequence
        from collie_core.launch.peers import joined

        if isinstance(error, Exception) and not is_consequence(error):
            with suppress(Exception):
                self.settle()
        peers = joined()
        if peers is not None:
            peers.fail(error)
        self.plugins.broadcast("collie_run_error", run=self.run, error=error)
        self.close(error)

    def close(self, error: BaseException | None) -> None:
        """End plugins and monitors."""
        self.plugins.broadcast("collie_run_end", run=self.run)
        for monitor in self.monitors:
            try:
                monitor.close(error)
            except Exception as failure:
                self._report(type(monitor).__name__, failure)
        self.monitors = []

    def peak_memory_gib(self) -> float:
        """Peak memory of this process so far, GiB: on the device, or resident on the host for the CPU."""
        if self.run.device.type == "cuda":
            import torch

            return torch.cuda.max_memory_allocated(self.run.device) / 2**30
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30

    def warn(self, message: str) -> None:
        """A warning on stderr."""
        self.note(f"warning: {message}")

    def note(self, message: str) -> None:
        """A line on stderr, from the first process alone."""
        if self.run.first:
            print(message, file=sys.stderr, flush=True)
