"""`metrics.jsonl`: the core's own record of a run, one JSON object a line, whatever the monitors."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from collie_core.files import write_text_atomic


class MetricsFile:
    """The figures of a run, a line for each step and each evaluation; every line has an integer `step`.

    Lines are strict JSON, so a figure that is not finite is null.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def append(self, metrics: Mapping[str, float]) -> None:
        """Add a line; it outlives a kill of the process.  Raises OSError where it cannot be written."""
        line = json.dumps({key: value if math.isfinite(value) else None for key, value in metrics.items()})
        with open(self.path, "ab") as file:
            file.write(line.encode() + b"\n")

    def read(self) -> list[dict[str, float | None]]:
        """Every whole line, in the order of writing; empty where there is no file."""
        return [metrics for _, metrics in self._lines()]

    def last_evaluation(self, step: int) -> dict[str, float]:
        """The figures of the newest evaluation at `step` or before; empty where there was none."""
        found: dict[str, float] = {}
        for _, metrics in self._lines():
            if metrics["step"] <= step and "loss" not in metrics:
                found = {key: math.nan if value is None else value for key, value in metrics.items()}
        found.pop("step", None)
        return found

    def truncate_after(self, step: int) -> None:
        """Drop the lines of later steps, and one that a kill cut short: a resumed run has each step once.

        The file is replaced whole, and only where something is dropped.
        """
        kept = b"".join(line + b"\n" for line, metrics in self._lines() if metrics["step"] <= step)
        if self.path.exists() and kept != self.path.read_bytes():
            write_text_atomic(self.path, kept.decode())

    def _lines(self) -> Iterator[tuple[bytes, dict[str, Any]]]:
        content = self.path.read_bytes() if self.path.exists() else b""
        for line in content.split(b"\n")[:-1]:  # what follows the last newline was cut short
            try:
                metrics = json.loads(line)
            except ValueError:  # zeros or halves of lines, as a crash of the machine leaves them
                continue
            if isinstance(metrics, dict) and isinstance(metrics.get("step"), int):
                yield line, metrics
