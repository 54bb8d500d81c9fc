"""A monitor that writes one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from collie_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from collie_core.run import Run


class JsonLines:
    """Figures and texts as JSON lines."""

    collie_api = 1

    @dataclass(frozen=True)
    class Options:
        """file stands in the run's output folder."""

        file: str = "acme.jsonl"

    def __init__(self, options: Options) -> None:
        self.options = options

    @hookimpl
    def collie_monitor(self, run: Run) -> JsonLinesMonitor:
        """The monitor of this run."""
        return JsonLinesMonitor(run.output_dir / self.options.file, run.step)


class JsonLinesMonitor:
    """Appends to `path`; what it holds of steps after `step` (a resumed run) is dropped."""

    def __init__(self, path: Path, step: int) -> None:
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        path.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
        self.path = path

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """A line of figures."""
        self._write({**metrics, "step": step})

    def text(self, step: int, key: str, value: str) -> None:
        """A line with a text."""
        self._write({"step": step, key: value})

    def close(self, error: BaseException | None) -> None:
        """Every line is written at once: nothing is left to do."""

    def _write(self, entry: Mapping[str, object]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
