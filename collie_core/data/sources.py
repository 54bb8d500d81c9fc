"""Where records come from: files, folders, Hugging Face data sets, objects; each opened as `Source`s.

A source gives random access to records and knows the line or index of each, for messages.
"""

from __future__ import annotations

import json
import re
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from collie_core.config.schema import SourceSection
from collie_core.errors import DataError, nearest

#: What may be given as a data set: sections of the config, or any object with a length and items.
Sources = Sequence[SourceSection] | Sequence[Mapping[str, Any]]


class BadRecord(Exception):
    """A record that cannot be used.

    reason is worded the same for all records with this fault (they are counted by it); detail is about
    this one.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason + detail)
        self.reason = reason


class Source(Protocol):
    """Records of one file or object."""

    name: str

    def __len__(self) -> int:
        """Number of records."""

    def record(self, index: int) -> Mapping[str, Any]:
        """The record, as its fields.  Raises BadRecord."""

    def number(self, index: int) -> int:
        """Where the record is: its line (from 1) in JSON Lines, its index (from 0) elsewhere."""


def origin(name: str, number: int) -> str:
    """`data/train.jsonl:17` (a line, from 1) or `train_dataset[17]` (an index, from 0)."""
    return f"{name}:{number}" if name.lower().endswith(".jsonl") else f"{name}[{number}]"


class JsonLines:
    """One JSON object a line; blank lines are passed over.  The file is mapped, not read into memory."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        with path.open("rb") as file:
            empty = path.stat().st_size == 0
            self._bytes = b"" if empty else mmap(file.fileno(), 0, access=ACCESS_READ)
            self._starts, self._ends, self._lines = array("q"), array("q"), array("q")
            position = 0
            for line_number, line in enumerate(file, 1):
                if not line.isspace():
                    self._starts.append(position)
                    self._ends.append(position + len(line))
                    self._lines.append(line_number)
                position += len(line)

    def __len__(self) -> int:
        return len(self._starts)

    def number(self, index: int) -> int:
        return self._lines[index]

    def record(self, index: int) -> Mapping[str, Any]:
        line = self._bytes[self._starts[index] : self._ends[index]].rstrip()
        try:
            return _fields(json.loads(line.decode("utf-8-sig")))
        except UnicodeDecodeError as error:
            raise BadRecord("is not UTF-8 text", f": {error.reason} at its byte {error.start}") from None
        except json.JSONDecodeError as error:
            raise BadRecord("is not valid JSON", f": {error.msg} at column {error.colno}") from None
        except RecursionError:
            raise BadRecord("is nested too deeply") from None


class Items:
    """Records that an object holds (a list, a Hugging Face data set, ...)."""

    def __init__(self, name: str, items: Any) -> None:
        is_sequence = hasattr(items, "__len__") and hasattr(items, "__getitem__")
        if not is_sequence or isinstance(items, Mapping | str | bytes):
            raise DataError(
                f"{name}: expected a sequence of records (with a length, and an item for each index), "
                f"got {type(items).__name__}"
            )
        self.name = name
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def number(self, index: int) -> int:
        return index

    def record(self, index: int) -> Mapping[str, Any]:
        return _fields(self._items[index])


class Parquet:
    """A Parquet file, read one row group at a time."""

    WINDOW = 1024  # records turned into Python objects at once

    def __init__(self, path: Path) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise DataError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from None
        self.name = str(path)
        self._arrow_error = pyarrow.ArrowException
        try:
            self._file = pyarrow.parquet.ParquetFile(path)
        except self._arrow_error as error:
            raise DataError(f"{path}: not a readable Parquet file: {error}") from None
        metadata = self._file.metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._firsts = np.cumsum([0, *sizes])
        self._group = -1
        self._window = range(0)
        self._records: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def number(self, index: int) -> int:
        return index

    def record(self, index: int) -> Mapping[str, Any]:
        if index not in self._window:
            group = bisect_right(self._firsts, index) - 1
            if group != self._group:
                try:
                    self._table, self._group = self._file.read_row_group(group), group
                except (self._arrow_error, OSError) as error:
                    raise DataError(f"{self.name}: row group {group} is damaged: {error}") from None
            first = int(self._firsts[group])
            begin = index - (index - first) % self.WINDOW
            self._records = self._table.slice(begin - first, self.WINDOW).to_pylist()
            self._window = range(begin, begin + len(self._records))
        return self._records[index - self._window.start]


class TokenFolder:
    """Records that are tokens already: `tokens.npy`, `offsets.npy` (one more than records) and, if not all
    tokens are trained, `labels.npy`; mapped into memory, not read into it."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._tokens, self._offsets = _map_array(path / "tokens.npy"), _map_array(path / "offsets.npy")
        labels = path / "labels.npy"
        self._labels = _map_array(labels) if labels.exists() else self._tokens
        if len(self._labels) != len(self._tokens):
            raise DataError(f"{labels}: {len(self._labels)} labels for {len(self._tokens)} tokens")
        size = len(self._tokens)
        rising = len(self._offsets) > 0 and not (np.diff(self._offsets) < 0).any()
        if not rising or self._offsets[0] != 0 or self._offsets[-1] != size:
            raise DataError(f"{path / 'offsets.npy'}: expected offsets that rise from 0 to {size}")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def number(self, index: int) -> int:
        return index

    def record(self, index: int) -> Mapping[str, Any]:
        here = slice(self._offsets[index], self._offsets[index + 1])
        return {"tokens": self._tokens[here], "labels": self._labels[here]}


def _map_array(path: Path) -> Any:
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path}: not a readable array: {error}") from None
    if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer):
        raise DataError(f"{path}: expected one row of integers, got {found.dtype} of shape {found.shape}")
    return found


def _fields(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise BadRecord("is no object with fields", f", it is a {type(value).__name__}")
    return value


def _json_list(path: Path) -> Items:
    """A `.json` file: a list of records, or an object in which one value is a list."""
    try:
        value = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        hint = "; a file with one record a line is to be named .jsonl" if error.msg == "Extra data" else ""
        what = f"is not valid JSON: {error.msg} at column {error.colno}{hint}"
        raise DataError(f"{path}:{error.lineno}: {what}") from None
    except RecursionError:
        raise DataError(f"{path}: is nested too deeply") from None
    lists = [item for item in value.values() if isinstance(item, list)] if isinstance(value, dict) else []
    if not isinstance(value, list):
        if len(lists) != 1:
            found = f"an object with {len(lists)} lists" if isinstance(value, dict) else type(value).__name__
            raise DataError(f"{path}: expected a list of records, or an object with one list, got {found}")
        value = lists[0]
    return Items(str(path), value)


READERS: dict[str, Callable[[Path], Source]] = {".jsonl": JsonLines, ".json": _json_list, ".parquet": Parquet}


def open_sources(given: Sources, split: str) -> list[list[Source]]:
    """The sources of each section of `given` (an object is one section named `<split>_dataset`).

    Raises DataError for what is missing, unreadable or empty.
    """
    opened: list[list[Source]] = [_open(section.path, f"data.{split}") for section in sections_of(given)]
    if not opened:
        opened = [[Items(f"{split}_dataset", given)]]
    for source in (source for sources in opened for source in sources):
        if len(source) == 0:
            raise DataError(f"{source.name}: holds no records")
    return opened


def sections_of(given: Sources) -> list[SourceSection]:
    """The sections of a config, or none for an object that holds records."""
    return [item for item in given if isinstance(item, SourceSection)] if isinstance(given, list) else []


def _open(text: str, key: str) -> list[Source]:
    path = Path(text).expanduser()
    if path.is_dir():
        if (path / "tokens.npy").exists():
            return [TokenFolder(path)]
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in READERS)
        files = [file for file in files if not file.name.startswith(".")]
        if not files:
            raise DataError(f"{key}: {text}: the folder holds no {_listed(READERS)} file")
        return [_read(file, key) for file in files]
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise DataError(f"{key}: {text}: expected a {_listed(READERS)} file")
        return [_read(path, key)]
    is_hub_name = re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", text) and path.suffix.lower() not in READERS
    if is_hub_name and ("/" not in text or not path.parent.is_dir()):
        return [_hub_dataset(text, key)]
    siblings = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
    missing = "" if path.parent.is_dir() else f" (nor is there a folder {path.parent})"
    raise DataError(f"{key}: {text}: no such file or folder{missing}{nearest(path.name, siblings)}")


def _read(path: Path, key: str) -> Source:
    try:
        return READERS[path.suffix.lower()](path)
    except OSError as error:
        raise DataError(f"{key}: {path}: cannot be read: {error.strerror or error}") from None


def _hub_dataset(text: str, key: str) -> Items:
    """`name` or `name:split` (default split `train`); code from the data set's repository is never run."""
    unknown = f"{key}: {text}: no such file or folder"
    try:
        import datasets
    except ImportError:
        cure = "reading it as a Hugging Face data set needs: pip install datasets"
        raise DataError(f"{unknown}; {cure}") from None
    name, _, split = text.partition(":")
    try:
        return Items(text, datasets.load_dataset(name, split=split or "train"))
    except Exception as error:  # the library raises many kinds, from connection errors to its own
        raise DataError(f"{unknown}, and no Hugging Face data set that loads: {error}") from None


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
