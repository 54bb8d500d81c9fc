"""The order of records and their rows: pure functions of seed and epoch, nothing lost, nothing overfull."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from collie_core.data.dataset import Counts, TokenizedDataset
from collie_core.data.order import epoch_order, exact_shares, permutation, walk
from collie_core.data.packing import OPEN_ROWS, packed_rows, single_rows


def dataset(sizes: list[int], weights: tuple[float, ...] | None = None) -> TokenizedDataset:
    """Groups of records of two tokens each."""
    total = sum(sizes)
    return TokenizedDataset(
        tokens=np.ones(2 * total, dtype=np.int32),
        labels=np.ones(2 * total, dtype=np.int32),
        offsets=np.arange(0, 2 * total + 2, 2),
        groups=np.repeat(np.arange(len(sizes)), sizes).astype(np.int32),
        files=np.zeros(total, dtype=np.int32),
        numbers=np.arange(total),
        names=("train_dataset",),
        weights=weights,
        counts=Counts(records=total),
    )


@pytest.mark.parametrize("size", [1, 2, 100, 1001])
def test_every_record_once_an_epoch(size: int) -> None:
    data = dataset([size])
    orders = [epoch_order(data, 42, epoch) for epoch in range(3)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(size))
    if size >= 100:
        assert len({tuple(order.tolist()) for order in [*orders, epoch_order(data, 43, 0)]}) == 4


def test_the_order_never_changes() -> None:
    """Written down once: a run must be resumable under other versions of this code and its libraries."""
    assert permutation(8, 42, 1, 0).tolist() == [1, 2, 5, 3, 6, 0, 4, 7]
    assert epoch_order(dataset([8]), 42, 0).tolist() == [1, 2, 5, 3, 6, 0, 4, 7]


def test_shuffles_are_fair() -> None:
    """Over many epochs each record stands at each place about equally often."""
    data = dataset([6])
    places = np.zeros((6, 6))
    for epoch in range(3000):
        places[np.arange(6), epoch_order(data, 7, epoch)] += 1
    assert abs(places / 500 - 1).max() < 0.2


@pytest.mark.parametrize(
    ("weights", "total", "shares"),
    [
        ((1, 1), 10, [5, 5]),
        ((1, 1, 1), 10, [4, 3, 3]),
        ((0.7, 0.2, 0.1), 7, [5, 1, 1]),
        ((1e-9, 1), 5, [0, 5]),
    ],
)
def test_shares_are_exact(weights: tuple[float, ...], total: int, shares: list[int]) -> None:
    assert exact_shares(weights, total) == shares


@pytest.mark.parametrize("weights", [(1.0, 3.0), (5.0, 1.0), (0.5, 0.5)])
def test_weighted_sources(weights: tuple[float, float]) -> None:
    """Exact shares an epoch; each source is walked through evenly, from one epoch into the next."""
    data = dataset([30, 11], weights)
    shares = exact_shares(weights, 41)
    seen = np.zeros(41, dtype=int)
    for epoch in range(5):
        order = epoch_order(data, 3, epoch)
        assert len(order) == 41
        assert np.bincount(data.groups[order], minlength=2).tolist() == shares
        np.add.at(seen, order, 1)
        np.testing.assert_array_equal(order, epoch_order(data, 3, epoch))
        for group in (0, 1):  # no record is ever two laps ahead of another of its source
            laps = seen[data.groups == group]
            assert laps.max() - laps.min() <= 1
    assert seen.sum() == 5 * 41
    mixed = [data.groups[epoch_order(data, 3, epoch)].tolist() for epoch in range(2)]
    assert mixed[0] != mixed[1]
    assert mixed[0] != sorted(mixed[0])


def test_a_weighted_source_is_shuffled_anew_for_each_lap() -> None:
    """Three laps of a small source in one epoch: together in order of the draw they repeat no lap."""
    data = dataset([300, 20], (0.8125, 0.1875))  # 60 of 320 from the second source
    laps = {tuple(walk(20, 20 * lap, 20, 3, 1).tolist()) for lap in range(3)}
    assert len(laps) == 3
    assert all(sorted(lap) == list(range(20)) for lap in laps)
    assert np.bincount(epoch_order(data, 3, 0), minlength=320)[300:].tolist() == [3] * 20


def lengths_of(kind: str, size: int) -> Any:
    draw = np.random.default_rng(0)
    drawn = {
        "exponential": lambda: draw.exponential(400, size),
        "lognormal": lambda: draw.lognormal(5.7, 0.8, size),
        "normal": lambda: draw.normal(400, 100, size),
        "long": lambda: draw.normal(2000, 400, size),
        "same": lambda: np.full(size, 400),
    }[kind]()
    return np.clip(drawn, 2, 2048).astype(np.int64)


@pytest.mark.parametrize(
    ("kind", "size", "fill"),
    [
        ("exponential", 20_000, 0.99),
        ("lognormal", 20_000, 0.99),
        ("normal", 20_000, 0.97),
        ("same", 20_000, 0.97),
        ("exponential", 300, 0.97),
        ("long", 2_000, 0.80),
        ("lognormal", 1, 0.0),
    ],
)
def test_packing(kind: str, size: int, fill: float) -> None:
    """Every record once, no row above the length, rows well filled."""
    lengths = lengths_of(kind, size)
    order = permutation(size, 42, 1, 0)
    rows = packed_rows(order, lengths, 2048)
    assert sorted(rows.records.tolist()) == list(range(size))
    per_row = [int(lengths[rows[row]].sum()) for row in range(len(rows))]
    assert 0 < min(per_row)
    assert max(per_row) <= 2048
    assert sum(per_row) / (len(rows) * 2048) >= fill
    again = packed_rows(order, lengths, 2048)
    np.testing.assert_array_equal(again.records, rows.records)
    np.testing.assert_array_equal(again.offsets, rows.offsets)


def test_packing_keeps_records_near_their_place() -> None:
    """Only a bounded number of rows is open, so a row is not a mixture of the whole epoch."""
    order, lengths = np.arange(50_000), lengths_of("exponential", 50_000)
    rows = packed_rows(order, lengths, 2048)
    spread = [int(np.ptp(rows[row])) for row in range(len(rows))]
    assert float(np.median(spread)) < 20 * OPEN_ROWS


def test_rows_without_packing() -> None:
    rows = single_rows(np.array([2, 0, 1]))
    assert [rows[row].tolist() for row in range(len(rows))] == [[2], [0], [1]]
    assert rows.between(1, 3).tolist() == [0, 1]
