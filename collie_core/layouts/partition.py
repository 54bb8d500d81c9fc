"""Which blocks each stage of a pipeline has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Literal

from collie_core.errors import ConfigError

#: (stage, first block, the block after the last) -> what the stage costs.
Cost = Callable[[int, int, int], int]


def partition(
    how: Literal["parameters", "compute", "uniform"] | Sequence[int],
    sizes: Sequence[int],
    before: int,
    after: int,
    stages: int,
) -> list[range]:
    """The blocks of each stage, in order, every stage having at least one.

    how: `parameters`: the largest stage is as small as can be; `compute`: the slowest as fast as can be, for
    which the embedding, of which rows are looked up, does not count; of several such cuts the one that is
    best by the other measure.  `uniform`: as many blocks for each, one more for the first ones where they do
    not divide; or the number of blocks of each stage.
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
        size, time = _cost(sizes, before, after, stages), _cost(sizes, 0, after, stages)
        first, then = (size, time) if how == "parameters" else (time, size)
        limit, _ = _least(first, stages, blocks, lambda *stage: True)
        _, counts = _least(then, stages, blocks, lambda *stage: first(*stage) <= limit)
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


def _cost(sizes: Sequence[int], before: int, after: int, stages: int) -> Cost:
    sums = [0, *accumulate(sizes)]

    def cost(stage: int, begin: int, end: int) -> int:
        extra = (before if stage == 0 else 0) + (after if stage == stages - 1 else 0)
        return sums[end] - sums[begin] + extra

    return cost


def _least(
    cost: Cost, stages: int, blocks: int, allowed: Callable[[int, int, int], bool]
) -> tuple[int, list[int]]:
    """The cut whose costliest stage costs the least, as (that cost, blocks of each stage).

    allowed: whether a stage may have these blocks.  By dynamic programming over the first blocks; of equal
    ways to cut them the one with fewer in front, where 1F1B keeps more micro-batches.
    """
    best: dict[int, tuple[int, list[int]]] = {0: (0, [])}
    for stage in range(stages):
        found = {}
        for end in range(stage + 1, blocks + 1):
            ways = [
                (max(worst, cost(stage, begin, end)), [*counts, end - begin])
                for begin, (worst, counts) in best.items()
                if begin < end and allowed(stage, begin, end)
            ]
            if ways:
                found[end] = min(ways)
        best = found
    return best[blocks]
