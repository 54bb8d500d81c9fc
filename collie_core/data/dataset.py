"""All records of a split as flat arrays of tokens."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from collie_core.data.records import IGNORED
from collie_core.data.sources import origin


@dataclass(frozen=True)
class Counts:
    """What became of the records that were read.

    records are those that can be trained; truncated of them were cut at max_length; dropped had no target
    token left by the cut; skipped were bad, by reason.  target_tokens have a loss.
    """

    records: int = 0
    tokens: int = 0
    target_tokens: int = 0
    truncated: int = 0
    dropped: int = 0
    skipped: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenizedDataset:
    """Records as tokens, in file order, in arrays that may lie in memory or be mapped from files.

    tokens, labels: int32, of all records one after the other; labels are IGNORED where no loss is wanted,
        always so at a record's first token, which nothing predicts.
    offsets: int64, one more than records; record i has tokens[offsets[i] : offsets[i + 1]].
    groups: int32, the section of the config that each record came from.
    weights: relative share of each section in an epoch, or None: every record once.
    files, numbers: int32 and int64, where each record came from, into `names` and within that file.
    """

    tokens: NDArray[np.int32]
    labels: NDArray[np.int32]
    offsets: NDArray[np.int64]
    groups: NDArray[np.int32]
    files: NDArray[np.int32]
    numbers: NDArray[np.int64]
    names: tuple[str, ...]
    weights: tuple[float, ...] | None
    counts: Counts

    ARRAYS = ("tokens", "labels", "offsets", "groups", "files", "numbers")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each record."""
        return np.diff(self.offsets)

    @cached_property
    def targets(self) -> NDArray[np.int64]:
        """Tokens with a loss of each record."""
        return count_targets(self.labels, self.offsets)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of every token, label and length, to tell whether a resumed run sees the same data."""
        digest = hashlib.blake2b(digest_size=16)
        for array in (self.offsets, self.tokens, self.labels):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def origin(self, record: int) -> str:
        """Where a record came from, such as `data/train.jsonl:17`."""
        return origin(self.names[self.files[record]], int(self.numbers[record]))

    def save(self, folder: Path) -> None:
        """Write the arrays into `folder`, for `open`, or to be a data source of its own."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in self.ARRAYS:
            np.save(folder / f"{name}.npy", getattr(self, name), allow_pickle=False)
        about = {"names": self.names, "weights": self.weights, "counts": asdict(self.counts)}
        (folder / "dataset.json").write_text(json.dumps(about), encoding="utf-8")

    @classmethod
    def open(cls, folder: Path) -> TokenizedDataset:
        """What `save` wrote, mapped into memory: processes of one machine share one copy."""
        arrays = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in cls.ARRAYS
        }
        about = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        weights = None if about["weights"] is None else tuple(about["weights"])
        return cls(**arrays, names=tuple(about["names"]), weights=weights, counts=Counts(**about["counts"]))


def count_targets(labels: NDArray[np.int32], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Labels other than IGNORED in each record; no record may be empty."""
    return np.add.reduceat(labels != IGNORED, offsets[:-1], dtype=np.int64)
