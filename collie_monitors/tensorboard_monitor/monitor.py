"""Event files in `output_dir/tensorboard`, by TensorBoard's own writer (torch's imports seven times as long)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

from collie_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from collie_core.run import Run


class TensorBoard:
    """Figures as scalars, texts as texts, the resolved config as the text `config`."""

    collie_api = 1

    @dataclass(frozen=True)
    class Options:
        """flush_seconds: figures reach the file after at most so many seconds."""

        flush_seconds: float = 10.0

    def __init__(self, options: Options) -> None:
        self._options = options
        self._monitor: TensorBoardMonitor | None = None

    @hookimpl
    def collie_check(self) -> list[str]:
        """The package must be there."""
        try:
            metadata.version("tensorboard")
        except metadata.PackageNotFoundError:
            return ["monitor tensorboard: the package tensorboard is not installed; pip install tensorboard"]
        return []

    @hookimpl
    def collie_monitor(self, run: Run) -> TensorBoardMonitor:
        """The monitor; in a resumed run the curves go on."""
        self._monitor = TensorBoardMonitor(run, self._options.flush_seconds)
        return self._monitor

    @hookimpl
    def collie_checkpoint_saving(self) -> None:
        """Whatever happens later, a run resumed from this checkpoint finds its figures up to here."""
        if self._monitor:
            self._monitor.flush()


class TensorBoardMonitor:
    """Writes one event file."""

    def __init__(self, run: Run, flush_seconds: float) -> None:
        import yaml
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(run.output_dir / "tensorboard"), flush_secs=flush_seconds)
        # a start at a step makes every reader drop what earlier files hold of that step and later ones
        first = run.step + 1 if run.step else 0
        self._add(first, session_log=SessionLog(status=SessionLog.START))
        config = yaml.safe_dump(run.config.to_mapping(), sort_keys=False, allow_unicode=True)
        self.text(run.step, "config", "".join(f"    {line}\n" for line in config.splitlines()))
        self.flush()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """A scalar under each key; `step` is the axis."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        figures = {key: value for key, value in metrics.items() if key != "step"}
        values = [Summary.Value(tag=key, simple_value=value) for key, value in figures.items()]
        self._add(step, summary=Summary(value=values))

    def text(self, step: int, key: str, value: str) -> None:
        """A text, shown as Markdown."""
        from tensorboard.plugins.text.summary_v2 import text_pb

        self._add(step, summary=text_pb(key, value))

    def flush(self) -> None:
        """Wait until all is in the file."""
        self._writer.flush()

    def close(self, error: BaseException | None) -> None:
        """Finish the file."""
        self._writer.close()

    def _add(self, step: int, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.add_event(Event(wall_time=time.time(), step=step, **content))
