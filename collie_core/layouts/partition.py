"""Which blocks each stage of a pipeline has."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

from collie_core.errors import ConfigError


def partition(
    how: Literal["parameters", "compute", "uniform"] | Sequence[int],
    sizes: Sequence[int],
    before: int,
    after: int,
    stages: int,
) -> list[range]:
    """The blocks of each stage, in order, every stage having at least one.

    how: `parameters`: the largest stage is as small as can be; `compute`: the slowest as fast as can be, for
    which the embedding, of which rows are looked up, does not count; `uniform`: as many blocks for each, one
    more for the first ones where they do not divide; or the number of blocks of each stage.
    sizes: parameters of each block; before, after: of the embedding and the head.
    Raises ConfigError where there are fewer blocks than stages, or the numbers do not add up.
    """
    blocks = len(sizes)
    if blocks < stages:
        raise ConfigError(f"the model has {blocks} blocks, too few for {stages} pipeline stages")
    if how == "uniform":
        least, more = divmod(blocks, stages)
        counts = [least + (stage < more) for stage in range(stages)]
    elif how in ("parameters", "compute"):
        counts = _balanced(list(sizes), 0 if how == "compute" else before, after, stages)
    else:
        assert not isinstance(how, str)
        counts = list(how)
        if len(counts) != stages or sum(counts) != blocks or min(counts) < 1:
            raise ConfigError(
                f"layout.pp_partition: {counts} must be {stages} numbers of at least 1 that add up to the "
                f"model's {blocks} blocks"
            )
    ends = list(accumulate(counts))
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


def _balanced(sizes: list[int], before: int, after: int, stages: int) -> list[int]:
    """Counts of blocks with the least largest stage: best[k] over the first k blocks, stage by stage."""
    sums = [0, *accumulate(sizes)]
    blocks = len(sizes)

    def cost(stage: int, begin: int, end: int) -> int:
        extra = (before if stage == 0 else 0) + (after if stage == stages - 1 else 0)
        return sums[end] - sums[begin] + extra

    best: list[dict[int, tuple[int, int]]] = [{end: (cost(0, 0, end), 0) for end in range(1, blocks + 1)}]
    for stage in range(1, stages):
        row: dict[int, tuple[int, int]] = {}
        for end in range(stage + 1, blocks + 1):
            row[end] = min(
                (max(best[stage - 1][begin][0], cost(stage, begin, end)), begin)
                for begin in range(stage, end)
            )
        best.append(row)
    counts, end = [], blocks
    for stage in reversed(range(stages)):
        begin = best[stage][end][1]
        counts.append(end - begin)
        end = begin
    return counts[::-1]
