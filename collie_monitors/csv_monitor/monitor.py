"""`output_dir/metrics.csv`: a row for each step and each evaluation, a column for each figure."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from collie_core.files import write_text_atomic
from collie_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from collie_core.run import Run


class Csv:
    """Writes every figure to `metrics.csv`; texts are left out."""

    collie_api = 1

    @dataclass(frozen=True)
    class Options:
        """None."""

    def __init__(self, options: Options) -> None:
        pass

    @hookimpl
    def collie_monitor(self, run: Run) -> CsvMonitor:
        """The monitor; what the file holds of later steps than the run's is dropped."""
        return CsvMonitor(run.output_dir / "metrics.csv", run.step)


class CsvMonitor:
    """Appends rows; a figure not seen before makes a new column, for which the file is written anew."""

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        self._columns = ["step"]
        rows = [row for row in self._read() if int(row["step"]) <= step]
        if rows:
            self._columns = list(rows[0])
            self._write(rows)
        else:
            path.unlink(missing_ok=True)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a row; cells of figures that it does not have are empty."""
        row = {"step": step, **metrics}
        new = [key for key in row if key not in self._columns]
        if new or not self._path.exists():
            self._columns += new
            self._write([*self._read(), row])
        else:
            with open(self._path, "a", encoding="utf-8", newline="") as file:
                self._writer(file).writerow(row)

    def text(self, step: int, key: str, value: str) -> None:
        """Nothing: the file holds figures."""

    def close(self, error: BaseException | None) -> None:
        """Nothing: every row is in the file as soon as it is logged."""

    def _read(self) -> list[dict[str, str]]:
        """The whole rows; a last one without its newline was cut short by a kill."""
        text = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
        return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))

    def _write(self, rows: Iterable[Mapping[str, object]]) -> None:
        content = io.StringIO()
        writer = self._writer(content)
        writer.writeheader()
        writer.writerows(rows)
        write_text_atomic(self._path, content.getvalue())

    def _writer(self, file: io.TextIOBase) -> csv.DictWriter[str]:
        return csv.DictWriter(file, self._columns, restval="", lineterminator="\n")
