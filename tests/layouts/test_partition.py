"""Which blocks each pipeline stage gets."""

from __future__ import annotations

import itertools

import pytest

from collie_core.errors import ConfigError
from collie_core.layouts.partition import partition


def counts(*arguments: object) -> list[int]:
    return [len(blocks) for blocks in partition(*arguments)]  # type: ignore[arg-type]


def largest(sizes: list[int], before: int, after: int, split: list[int]) -> int:
    """Parameters of the largest stage; those that multiply, of the slowest, where `before` is 0."""
    ends = list(itertools.accumulate(split))
    stages = [sum(sizes[end - count : end]) for end, count in zip(ends, split, strict=True)]
    stages[0] += before
    stages[-1] += after
    return max(stages)


@pytest.mark.parametrize("stages", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("how", ["parameters", "compute", "uniform"])
def test_the_stages_are_consecutive_and_none_is_empty(how: str, stages: int) -> None:
    found = partition(how, [3, 1, 4, 1, 5, 9, 2, 6], 7, 2, stages)  # type: ignore[arg-type]
    assert [block for blocks in found for block in blocks] == list(range(8))
    assert len(found) == stages and all(found)


def test_uniform_gives_one_more_to_the_first_stages() -> None:
    assert counts("uniform", [1] * 8, 100, 0, 3) == [3, 3, 2]


def test_equal_blocks_without_ends_are_cut_evenly() -> None:
    assert counts("parameters", [5] * 8, 0, 0, 4) == [2, 2, 2, 2]


def test_a_large_embedding_leaves_fewer_blocks_to_the_first_stage() -> None:
    assert counts("parameters", [10] * 8, 40, 0, 2) == [2, 6]
    assert counts("parameters", [10] * 8, 0, 60, 2) == [7, 1]


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("ends", [(0, 0), (9, 0), (0, 20), (7, 11)])
@pytest.mark.parametrize("how", ["parameters", "compute"])
def test_no_other_cut_is_better_by_its_measure_nor_as_good_and_better_by_the_other(
    how: str, stages: int, ends: tuple[int, int]
) -> None:
    sizes, (before, after) = [3, 1, 4, 1, 5, 9, 2, 6], ends
    every = [
        [*split, len(sizes) - sum(split)]
        for split in itertools.product(range(1, len(sizes)), repeat=stages - 1)
        if sum(split) < len(sizes)
    ]

    def measures(split: list[int]) -> list[int]:
        size, time = largest(sizes, before, after, split), largest(sizes, 0, after, split)
        return [size, time] if how == "parameters" else [time, size]

    assert measures(counts(how, sizes, before, after, stages)) == min(map(measures, every))


def test_by_compute_only_what_multiplies_counts() -> None:
    assert counts("compute", [10] * 8, 40, 0, 2) == [4, 4]
    assert counts("compute", [10] * 8, 40, 40, 2) == [6, 2]


def test_of_cuts_as_fast_as_each_other_the_smallest_is_taken() -> None:
    # the shapes of Llama 3 8B, in millions: no cut is faster than five blocks
    assert counts("compute", [218] * 32, 525, 525, 8) == counts("parameters", [218] * 32, 525, 525, 8)


def test_explicit_numbers_are_taken_as_they_are() -> None:
    assert partition([1, 3, 2], [1] * 6, 0, 0, 3) == [range(0, 1), range(1, 4), range(4, 6)]


@pytest.mark.parametrize("wrong", [[3, 2], [2, 2, 1], [0, 3, 3], [2, 2, 1, 1]])
def test_numbers_that_do_not_add_up_are_refused(wrong: list[int]) -> None:
    with pytest.raises(ConfigError, match="3 numbers of at least 1 that add up to the model's 6 blocks"):
        partition(wrong, [1] * 6, 0, 0, 3)


@pytest.mark.parametrize("how", ["parameters", "uniform", [1, 1, 1]])
def test_more_stages_than_blocks_are_refused(how: object) -> None:
    with pytest.raises(ConfigError, match="2 blocks, too few for 3 pipeline stages"):
        partition(how, [1, 1], 0, 0, 3)  # type: ignore[arg-type]
