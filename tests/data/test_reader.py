"""Steps: the same records for the same global batch on any number of ranks, and after any resume."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from collie_core.config.schema import CollieConfig
from collie_core.data.batch import MicroBatch, StepBatch
from collie_core.data.build import build_dataset, build_reader
from collie_core.data.dataset import TokenizedDataset
from collie_core.data.prefetch import prefetch
from collie_core.data.reader import DataReader, EvaluationBatches
from collie_core.errors import CheckpointError

PAD = 0
MAX_LENGTH = 32
RECORDS = 53


@pytest.fixture(scope="module")
def dataset(bpe: Any) -> TokenizedDataset:
    """53 records of 2 to 21 tokens, all different: token values count up."""
    draw = np.random.default_rng(0)
    records, start = [], 5
    for _ in range(RECORDS):
        size = int(draw.integers(2, 22))
        tokens = [5 + (start + place) % 300 for place in range(size)]
        masked = int(draw.integers(0, size - 1))
        records.append({"tokens": tokens, "labels": [-100] * masked + tokens[masked:]})
        start += size
    from collie_core.config.schema import DataSection

    return build_dataset(records, bpe, DataSection(max_length=MAX_LENGTH), split="train")


def reader(
    dataset: TokenizedDataset,
    rank: int = 0,
    ranks: int = 1,
    micro: int = 2,
    accumulation: int = 4,
    packing: bool = False,
) -> DataReader:
    return DataReader(
        dataset,
        micro_batch_size=micro,
        accumulation=accumulation,
        dp_rank=rank,
        dp_size=ranks,
        seed=42,
        packing=packing,
        pad_token_id=PAD,
        max_length=MAX_LENGTH,
    )


def origins(step: StepBatch) -> list[str]:
    """The records of a step in order; fillers have none."""
    return [name for batch in step.micro_batches for row in batch.records for name in row]


def same(first: StepBatch, second: StepBatch) -> bool:
    def equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
        return one is other if one is None or other is None else torch.equal(one, other)

    return (
        (first.step, first.epoch, first.target_tokens, first.tokens)
        == (second.step, second.epoch, second.target_tokens, second.tokens)
        and len(first.micro_batches) == len(second.micro_batches)
        and all(
            equal(one.input_ids, other.input_ids)
            and equal(one.labels, other.labels)
            and equal(one.positions, other.positions)
            and equal(one.segments, other.segments)
            and one.records == other.records
            for one, other in zip(first.micro_batches, second.micro_batches, strict=True)
        )
    )


@pytest.mark.parametrize("packing", [False, True])
def test_an_epoch_holds_every_record_once(dataset: TokenizedDataset, packing: bool) -> None:
    source = reader(dataset, packing=packing)
    steps = list(islice(source, source.total_steps(3)))
    assert [step.step for step in steps] == list(range(1, len(steps) + 1))
    for epoch in range(3):
        inside = [step for step in steps if step.epoch == epoch]
        assert len(inside) == source.steps_per_epoch(epoch)
        found = [name for step in inside for name in origins(step)]
        assert sorted(found) == sorted(dataset.origin(record) for record in range(RECORDS))
        assert sum(step.tokens for step in inside) == dataset.counts.tokens
        assert sum(step.target_tokens for step in inside) == dataset.counts.target_tokens
    assert origins(steps[0]) != origins(steps[source.steps_per_epoch(0)])


@pytest.mark.parametrize("packing", [False, True])
def test_tokens_labels_positions_and_segments(dataset: TokenizedDataset, packing: bool) -> None:
    """Each row is its records one after the other; what is said of them is read back from the tensors."""
    numbers = {dataset.origin(record): record for record in range(RECORDS)}
    source = reader(dataset, packing=packing)
    for step in islice(source, source.total_steps(1)):
        assert sum(batch.target_tokens for batch in step.micro_batches) == step.target_tokens
        for batch in step.micro_batches:
            rows, length = batch.input_ids.shape
            assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
            sizes = [sum(int(dataset.lengths[numbers[name]]) for name in row) for row in batch.records]
            assert batch.tokens == sum(sizes)
            assert length == -(-max(sizes) // 8) * 8
            assert (batch.positions is None, batch.segments is None) == (not packing, not packing)
            for line in range(rows):
                begin = 0
                for segment, name in enumerate(batch.records[line], 1):
                    record = numbers[name]
                    stored = slice(dataset.offsets[record], dataset.offsets[record + 1])
                    here = slice(begin, begin + stored.stop - stored.start)
                    assert batch.input_ids[line, here].tolist() == dataset.tokens[stored].tolist()
                    assert batch.labels[line, here].tolist() == dataset.labels[stored].tolist()
                    assert batch.labels[line, begin] == -100
                    if batch.positions is not None and batch.segments is not None:
                        assert batch.positions[line, here].tolist() == list(range(here.stop - begin))
                        assert set(batch.segments[line, here].tolist()) == {segment}
                    begin = here.stop
                assert set(batch.input_ids[line, begin:].tolist()) <= {PAD}
                assert set(batch.labels[line, begin:].tolist()) <= {-100}
                if batch.segments is not None:
                    assert set(batch.segments[line, begin:].tolist()) <= {0}
            if packing:
                assert max(sizes) <= MAX_LENGTH
            else:
                assert all(len(row) == 1 for row in batch.records)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_ranks_share_the_step_of_one(dataset: TokenizedDataset, ranks: int, packing: bool) -> None:
    """dp slices, put together in rank order, are the rows of one process with more accumulation."""
    one = reader(dataset, micro=2, accumulation=2 * ranks, packing=packing)
    many = [reader(dataset, rank, ranks, micro=2, accumulation=2, packing=packing) for rank in range(ranks)]
    assert one.total_steps(3) == many[0].total_steps(3)
    for whole, *parts in islice(zip(one, *many, strict=True), one.total_steps(3)):
        assert origins(whole) == [name for part in parts for name in origins(part)]
        assert {part.target_tokens for part in parts} == {whole.target_tokens}
        assert (
            sum(batch.target_tokens for part in parts for batch in part.micro_batches) == whole.target_tokens
        )
        assert {part.tokens for part in parts} == {whole.tokens}
        assert sum(batch.tokens for part in parts for batch in part.micro_batches) == whole.tokens
        shapes = [[batch.input_ids.shape[0] for batch in part.micro_batches] for part in parts]
        assert all(shape == shapes[0] for shape in shapes), (
            "every rank has as many micro-batches of as many rows"
        )
        assert sum(shapes[0]) == -(-sum(len(batch.records) for batch in whole.micro_batches) // ranks)


def test_a_partial_step_has_only_the_micro_batches_it_needs(dataset: TokenizedDataset) -> None:
    """53 records, 16 a step: the last has 5, so of 4 ranks one has two rows and three a filler each."""
    parts = []
    for rank in range(4):
        source = reader(dataset, rank, 4, micro=2, accumulation=2)
        parts.append(list(islice(source, source.total_steps(1)))[-1])
    assert [len(part.micro_batches) for part in parts] == [1] * 4
    batches = [part.micro_batches[0] for part in parts]
    assert [batch.input_ids.shape[0] for batch in batches] == [2] * 4
    assert [len([row for row in batch.records if row]) for batch in batches] == [2, 1, 1, 1]
    for batch in batches[1:]:
        assert batch.records[1] == ()
        assert set(batch.labels[1].tolist()) == {-100}
        assert batch.tokens == int(dataset.lengths[[int(batch.records[0][0][14:-1])]].sum())


@pytest.mark.parametrize("packing", [False, True])
def test_the_largest_micro_batch_is_known_before(dataset: TokenizedDataset, packing: bool) -> None:
    source = reader(dataset, packing=packing)
    seen = max(
        batch.input_ids.numel()
        for step in islice(source, source.total_steps(2))
        for batch in step.micro_batches
    )
    assert seen == source.largest_micro_batch()


def test_more_ranks_than_rows(dataset: TokenizedDataset) -> None:
    """A rank with nothing but a filler still takes part."""
    last = []
    for rank in range(26):
        source = reader(dataset, rank, 26, micro=2, accumulation=1)
        assert source.steps_per_epoch(0) == 2
        last.append(list(islice(source, 2))[-1])
    assert [len(part.micro_batches) for part in last] == [1] * 26
    assert [part.micro_batches[0].tokens > 0 for part in last] == [True] + [False] * 25
    assert all(part.target_tokens == last[0].micro_batches[0].target_tokens > 0 for part in last)


@pytest.mark.parametrize("packing", [False, True])
def test_resume_at_every_step(dataset: TokenizedDataset, packing: bool) -> None:
    """Also in epoch 2 and on its border: the rest is the same to the bit."""
    source = reader(dataset, packing=packing, accumulation=3)
    total = source.total_steps(3)
    steps, states = [], [source.state()]
    for step in islice(source, total):
        steps.append(step)
        states.append(source.state())
    assert states[0] == {"epoch": 0, "row": 0}
    for done, state in enumerate(states[:-1]):
        resumed = reader(dataset, packing=packing, accumulation=3)
        resumed.restore(state)
        assert resumed.state() == state
        for expected, found in zip(steps[done : done + 4], resumed, strict=False):
            assert same(expected, found)


@pytest.mark.parametrize("packing", [False, True])
def test_resume_on_other_numbers_of_ranks(dataset: TokenizedDataset, packing: bool) -> None:
    """dp 1 -> 2 -> 4 -> 1 with an equal global batch, into epochs 2 and 3: the same global records."""
    whole = reader(dataset, micro=2, accumulation=4, packing=packing)
    expected = [origins(step) for step in islice(whole, whole.total_steps(3))]
    found: list[list[str]] = []
    state = {"epoch": 0, "row": 0}
    for ranks, count in (
        (1, 2),
        (2, whole.steps_per_epoch(0)),
        (4, whole.steps_per_epoch(1)),
        (1, len(expected)),
    ):
        readers = [
            reader(dataset, rank, ranks, micro=2, accumulation=4 // ranks, packing=packing)
            for rank in range(ranks)
        ]
        for one in readers:
            one.restore(state)
        count = min(count, len(expected) - len(found))
        for parts in islice(zip(*readers, strict=True), count):
            assert {part.step for part in parts} == {len(found) + 1}
            found.append([name for part in parts for name in origins(part)])
        assert all(one.state() == readers[0].state() for one in readers)
        state = readers[0].state()
    assert found == expected


def test_a_position_of_another_global_batch_is_refused(dataset: TokenizedDataset) -> None:
    source = reader(dataset)
    for row in (3, 56, -8):
        with pytest.raises(CheckpointError, match=f"epoch 1, row {row}"):
            source.restore({"epoch": 1, "row": row})


def test_the_state_is_that_of_the_steps_handed_out(dataset: TokenizedDataset) -> None:
    """Not of those made ahead in the background."""
    source = reader(dataset)
    steps = iter(source)
    next(steps)
    time.sleep(0.05)
    assert source.state() == {"epoch": 0, "row": 8}


def test_evaluation_goes_through_the_file_once(dataset: TokenizedDataset) -> None:
    for ranks in (1, 2, 4):
        parts = [
            EvaluationBatches(dataset, micro_batch_size=3, dp_rank=rank, dp_size=ranks, pad_token_id=PAD)
            for rank in range(ranks)
        ]
        found: list[str] = []
        targets = 0
        for batches in zip(*parts, strict=True):
            found += [name for batch in batches for row in batch.records for name in row]
            targets += sum(batch.target_tokens for batch in batches)
        assert found == [dataset.origin(record) for record in range(RECORDS)]
        assert targets == dataset.counts.target_tokens
        assert {len(part) for part in parts} == {len(list(parts[0]))} == {-(-RECORDS // (3 * ranks))}


def test_weighted_sources_resume(bpe: Any, tmp_path: Any) -> None:
    """The walk through each source goes on from epoch to epoch, whoever reads it."""
    for name, size in (("a", 9), ("b", 4)):
        lines = [f'{{"text": "{name} hello {number}"}}\n' for number in range(size)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    sources = [
        {"path": str(tmp_path / f"{name}.jsonl"), "weight": weight}
        for name, weight in (("a", 1.0), ("b", 2.0))
    ]
    config = CollieConfig(
        model={"path": "none"}, data={"train": sources}, train={"micro_batch_size": 2, "global_batch_size": 4}
    )
    assert config.data.train is not None
    data = build_dataset(config.data.train, bpe, config.data, split="train")
    source = build_reader(data, config, dp_rank=0, pad_token_id=PAD)
    steps = list(islice(source, source.total_steps(4)))
    names = [name for step in steps for name in origins(step)]
    assert len(names) == 4 * 13
    assert [
        sum("b.jsonl" in name for name in names[13 * epoch : 13 * (epoch + 1)]) for epoch in range(4)
    ] == [9] * 4
    again = build_reader(data, config, dp_rank=0, pad_token_id=PAD)
    again.restore({"epoch": 2, "row": 4})
    assert same(next(iter(again)), steps[source.total_steps(2) + 1])


def test_moving_a_batch(dataset: TokenizedDataset) -> None:
    batch = next(iter(reader(dataset, packing=True))).micro_batches[0]
    moved = batch.to(torch.device("cpu"))
    assert isinstance(moved, MicroBatch)
    assert torch.equal(moved.input_ids, batch.input_ids) and moved.records == batch.records


class Broken(Exception):
    pass


def test_prefetch_passes_items_and_errors_on() -> None:
    def failing() -> Iterator[int]:
        yield from range(5)
        raise Broken("the sixth")

    assert list(prefetch(range(100), 3)) == list(range(100))
    found = []
    with pytest.raises(Broken, match="the sixth"):
        for item in prefetch(failing(), 2):
            found.append(item)
    assert found == list(range(5))


def test_prefetch_works_ahead_and_ends_its_thread() -> None:
    made = []

    def counting() -> Iterator[int]:
        for item in range(1000):
            made.append(item)
            yield item

    before = threading.active_count()
    items = prefetch(counting(), 4)
    assert next(items) == 0
    deadline = time.monotonic() + 5
    while len(made) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert 5 <= len(made) <= 6, "four in the queue and one in hand"
    items.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
