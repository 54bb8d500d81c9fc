"""The steps of training, in an order that depends on the seed alone, and the batches of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from collie_core.data.batch import MicroBatch, StepBatch
from collie_core.data.collate import Row, collate, micro_batches, padded_length, rank_rows
from collie_core.data.dataset import TokenizedDataset
from collie_core.data.order import epoch_order
from collie_core.data.packing import Rows, packed_rows, single_rows
from collie_core.data.prefetch import prefetch
from collie_core.errors import CheckpointError

PREFETCHED_STEPS = 3
PREFETCHED_BATCHES = 8


class DataReader:
    """Training steps of one data-parallel rank, epoch after epoch without end.

    The rows of an epoch are a function of (dataset, seed, packing, max_length, epoch).  Step n takes the
    next micro_batch_size * accumulation * dp_size of them, rank r its slice, so equal global batches have
    equal rows whatever dp_size is.  The last step of an epoch takes what is left, in only as many
    micro-batches as that needs.  A position is two integers, the epoch and the rows done in it.
    """

    def __init__(
        self,
        dataset: TokenizedDataset,
        *,
        micro_batch_size: int,
        accumulation: int,
        dp_rank: int,
        dp_size: int,
        seed: int,
        packing: bool,
        pad_token_id: int,
        max_length: int,
        count_micro_batches: Callable[[int], int] | None = None,
    ) -> None:
        """count_micro_batches: into how many micro-batches, as equal as can be, a layout wants a rank's rows
        of a step cut; None: as many as are needed, of micro_batch_size rows."""
        self.dataset = dataset
        self._count = count_micro_batches
        self._micro_batch_size = micro_batch_size
        self._global_rows = micro_batch_size * accumulation * dp_size
        self._rank, self._ranks = dp_rank, dp_size
        self._seed, self._packing, self._max_length = seed, packing, max_length
        self._pad_token_id = pad_token_id
        self._row_counts: dict[int, int] = {}
        self._position = (0, 0)

    def rows(self, epoch: int) -> Rows:
        """Every row of an epoch, in order, over all ranks."""
        order = epoch_order(self.dataset, self._seed, epoch)
        if self._packing:
            rows = packed_rows(order, self.dataset.lengths, self._max_length)
        else:
            rows = single_rows(order)
        self._row_counts[epoch] = len(rows)
        return rows

    def _row_count(self, epoch: int) -> int:
        if not self._packing:
            return len(self.dataset)
        if epoch not in self._row_counts:
            self.rows(epoch)
        return self._row_counts[epoch]

    def steps_per_epoch(self, epoch: int) -> int:
        """Optimizer steps of an epoch, the last one perhaps partial."""
        return -(-self._row_count(epoch) // self._global_rows)

    def total_steps(self, epochs: int) -> int:
        """Optimizer steps of the first `epochs` epochs."""
        return sum(self.steps_per_epoch(epoch) for epoch in range(epochs))

    def largest_micro_batch(self) -> int:
        """Positions, padding included, of the largest micro-batch that may come."""
        rows = self._global_rows // self._ranks
        size = self._micro_batch_size if self._count is None else -(-rows // min(self._count(rows), rows))
        longest = self._max_length if self._packing else int(self.dataset.lengths.max())
        return size * padded_length(longest, self._max_length)

    def state(self) -> dict[str, int]:
        """The position after the last step that was handed out: `epoch`, and `row` within it."""
        epoch, row = self._position
        return {"epoch": epoch, "row": row}

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on from a `state`, perhaps of another dp_size, with an equal global batch.

        Raises CheckpointError for a position between two steps of this reader.
        """
        epoch, row = state["epoch"], state["row"]
        if row % self._global_rows or not 0 <= row < self._row_count(epoch):
            raise CheckpointError(
                f"the data position (epoch {epoch}, row {row}) is not at a step of {self._global_rows} rows: "
                "resume with the global batch and the data that the run had"
            )
        self._position = (epoch, row)

    def __iter__(self) -> Iterator[StepBatch]:
        """Steps from the position on, without end."""
        return self.steps()

    def steps(self, last: int | None = None) -> Iterator[StepBatch]:
        """Steps from the position on, up to number `last`, made ahead in a background thread."""
        for batch, position in prefetch(self._steps(*self._position, last), PREFETCHED_STEPS):
            self._position = position
            yield batch

    def _steps(self, epoch: int, row: int, final: int | None) -> Iterator[tuple[StepBatch, tuple[int, int]]]:
        """Each step with the position after it; an epoch is packed when its first step is made."""
        step = self.total_steps(epoch) + row // self._global_rows
        while final is None or step < final:
            rows = self.rows(epoch)
            for first in range(row, len(rows), self._global_rows):
                if step == final:
                    return
                last = min(first + self._global_rows, len(rows))
                step += 1
                position = (epoch, last) if last < len(rows) else (epoch + 1, 0)
                yield self._step_batch(rows, first, last, step, epoch), position
            epoch, row = epoch + 1, 0

    def _parts(self, rows: list[Row]) -> Iterator[list[Row]]:
        """The rows of each micro-batch, in order."""
        if self._count is None:
            size = self._micro_batch_size
            yield from (rows[begin : begin + size] for begin in range(0, len(rows), size))
            return
        count = min(self._count(len(rows)), len(rows))
        least, more = divmod(len(rows), count)
        begin = 0
        for index in range(count):
            end = begin + least + (index < more)
            yield rows[begin:end]
            begin = end

    def _step_batch(self, rows: Rows, first: int, last: int, step: int, epoch: int) -> StepBatch:
        mine = rank_rows(rows, first, last, self._rank, self._ranks)
        batches = tuple(
            collate(
                self.dataset,
                part,
                packing=self._packing,
                pad_token_id=self._pad_token_id,
                max_length=self._max_length,
            )
            for part in self._parts(mine)
        )
        return StepBatch(
            step=step,
            epoch=epoch,
            micro_batches=batches,
            target_tokens=int(self.dataset.targets[rows.between(first, last)].sum()),
            tokens=int(self.dataset.lengths[rows.between(first, last)].sum()),
        )


class EvaluationBatches:
    """Micro-batches that hold every record once, in file order, one a row; as many on every rank."""

    def __init__(
        self,
        dataset: TokenizedDataset,
        *,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        pad_token_id: int,
    ) -> None:
        self.dataset = dataset
        self._micro_batch_size = micro_batch_size
        self._rank, self._ranks = dp_rank, dp_size
        self._pad_token_id = pad_token_id

    def __len__(self) -> int:
        return -(-len(self.dataset) // (self._micro_batch_size * self._ranks))

    def __iter__(self) -> Iterator[MicroBatch]:
        return prefetch(self._batches(), PREFETCHED_BATCHES)

    def _batches(self) -> Iterator[MicroBatch]:
        rows = single_rows(np.arange(len(self.dataset)))
        size, longest = self._micro_batch_size * self._ranks, int(self.dataset.lengths.max())
        for first in range(0, len(rows), size):
            mine = rank_rows(rows, first, min(first + size, len(rows)), self._rank, self._ranks)
            yield from micro_batches(
                self.dataset,
                mine,
                self._micro_batch_size,
                packing=False,
                pad_token_id=self._pad_token_id,
                max_length=longest,
            )
