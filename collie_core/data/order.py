"""The order of records in an epoch: a pure function of the seed and the epoch.

Keys for sorting are drawn with PCG64's raw stream, which NumPy keeps the same for ever (its
`Generator.permutation` may change between versions), so a run can be resumed under another NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from collie_core.data.dataset import TokenizedDataset

# What a permutation is for, so that no two uses share a stream.
RECORDS, WITHIN_SOURCE, MIX = 1, 2, 3


def epoch_order(dataset: TokenizedDataset, seed: int, epoch: int) -> NDArray[np.int64]:
    """Record numbers in the order of an epoch, as many as the data set has.

    Without weights every record comes once.  With weights, each source gives its share of the epoch,
    walking through its own shuffled records and shuffling them anew when all were seen, on into the next
    epoch.
    """
    size = len(dataset)
    if dataset.weights is None:
        return permutation(size, seed, RECORDS, epoch)
    shares = exact_shares(dataset.weights, size)
    drawn = []
    for group, share in enumerate(shares):
        records = np.flatnonzero(dataset.groups == group)
        drawn.append(records[walk(len(records), epoch * share, share, seed, group)])
    return np.concatenate(drawn)[permutation(size, seed, MIX, epoch)]


def permutation(size: int, seed: int, purpose: int, first: int, second: int = 0) -> NDArray[np.int64]:
    """A permutation of 0..size-1 that depends on the numbers given alone."""
    keys = np.random.PCG64(np.random.SeedSequence([seed, purpose, first, second])).random_raw(size)
    return np.argsort(keys, kind="stable")


def exact_shares(weights: Sequence[float], total: int) -> list[int]:
    """`total` split in proportion to the weights, by largest remainder; the parts add up to it."""
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * total
    shares = np.floor(exact).astype(np.int64)
    largest = np.argsort(shares - exact, kind="stable")
    shares[largest[: total - int(shares.sum())]] += 1
    return [int(share) for share in shares]


def walk(size: int, begin: int, count: int, seed: int, group: int) -> NDArray[np.int64]:
    """`count` places from the endless row of shuffled laps over 0..size-1, from place `begin` on."""
    laps = range(begin // size, -(-(begin + count) // size))
    places = [permutation(size, seed, WITHIN_SOURCE, group, lap) for lap in laps]
    skipped = begin - laps.start * size
    return np.concatenate([np.empty(0, dtype=np.int64), *places])[skipped : skipped + count]
