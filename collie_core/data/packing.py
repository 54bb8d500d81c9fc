"""Rows of records: several to a row where packing is on, else one."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

OPEN_ROWS = 256  # more fill rows better; fewer keep records nearer to their place in the order


@dataclass(frozen=True)
class Rows:
    """The rows of an epoch in order: row i has records[offsets[i] : offsets[i + 1]] (numbers, int64)."""

    records: NDArray[np.int64]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> NDArray[np.int64]:
        return self.records[self.offsets[row] : self.offsets[row + 1]]

    def between(self, first: int, last: int) -> NDArray[np.int64]:
        """Records of rows first..last-1."""
        return self.records[self.offsets[first] : self.offsets[last]]


def single_rows(order: NDArray[np.int64]) -> Rows:
    """One record a row."""
    return Rows(order, np.arange(len(order) + 1, dtype=np.int64))


def packed_rows(order: NDArray[np.int64], lengths: NDArray[np.int64], max_length: int) -> Rows:
    """Records, taken in `order`, put into rows of at most max_length tokens.

    Each goes into the open row that it fills best, or else into a new one; of more than OPEN_ROWS rows
    the fullest is closed.  Rows come in the order in which they were opened.  `lengths` are those of all
    records by number, none above max_length.
    """
    sizes = lengths[order].tolist()
    shortest = min(sizes, default=0)
    row_of = np.empty(len(sizes), dtype=np.int64)
    opened: list[tuple[int, int]] = []  # (free tokens, row), ascending
    rows = 0
    for place, size in enumerate(sizes):
        best = bisect_left(opened, (size, -1))
        if best < len(opened):
            free, row = opened.pop(best)
            free -= size
        else:
            free, row = max_length - size, rows
            rows += 1
        row_of[place] = row
        if free >= shortest:
            insort(opened, (free, row))
            if len(opened) > OPEN_ROWS:
                del opened[0]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=rows))]).astype(np.int64)
    return Rows(order[np.argsort(row_of, kind="stable")], offsets)
