"""Event files in `output_dir/tensorboard`, by TensorBoard's own record writer, which needs no torch."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

from collie_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from collie_core.run import Run

PREFIX = "events.out.tfevents."


class TensorBoard:
    """TensorBoard: figures as scalars, texts as texts, the resolved config as the text `config`."""

    collie_api = 1

    @dataclass(frozen=True)
    class Options:
        """None."""

    def __init__(self, options: Options) -> None:
        pass

    @hookimpl
    def collie_check(self) -> list[str]:
        """The package must be there."""
        try:
            metadata.version("tensorboard")
        except metadata.PackageNotFoundError:
            return ["the package tensorboard is not installed; pip install tensorboard"]
        return []

    @hookimpl
    def collie_monitor(self, run: Run) -> TensorBoardMonitor:
        """The monitor; in a resumed run the curves go on."""
        return TensorBoardMonitor(run)


class TensorBoardMonitor:
    """Writes one event file; what is logged is in it at once, so that a kill loses nothing."""

    def __init__(self, run: Run) -> None:
        import yaml
        from tensorboard.compat.proto.event_pb2 import SessionLog

        folder = run.output_dir / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        earlier = [int(path.name.split(".")[3]) for path in folder.glob(f"{PREFIX}*")]
        stamp = max([int(time.time()), *(second + 1 for second in earlier)])  # readers go by the name
        self._path = folder / f"{PREFIX}{stamp:010}.{socket.gethostname()}.{os.getpid()}"
        self._add(0, file_version="brain.Event:2")
        if earlier:  # a start at a step makes readers drop what earlier files hold from that step on
            self._add(run.step + 1 if run.step else 0, session_log=SessionLog(status=SessionLog.START))
        config = yaml.safe_dump(run.config.to_mapping(), sort_keys=False, allow_unicode=True)
        self.text(run.step, "config", "".join(f"    {line}\n" for line in config.splitlines()))

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

    def close(self, error: BaseException | None) -> None:
        """Nothing: all is in the file."""

    def _add(self, step: int, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        event = Event(wall_time=time.time(), step=step, **content)
        with open(self._path, "ab") as file:
            RecordWriter(file).write(event.SerializeToString())
