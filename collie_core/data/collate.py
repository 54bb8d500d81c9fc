"""Rows of records to the tensors of a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from collie_core.data.batch import MicroBatch
from collie_core.data.dataset import TokenizedDataset
from collie_core.data.packing import Rows
from collie_core.data.records import IGNORED
from collie_core.ops.context import Records

MULTIPLE = 8  # row lengths are rounded up to it, for the sake of tensor cores
SIZES = 8  # lengths of rows between a power of two and the next: kernels are made for each length they meet


class Row(NamedTuple):
    """Records of one row.  A filler makes ranks equal: it is computed like any row, with no target in it."""

    records: NDArray[np.int64]
    filler: bool = False


def rank_rows(rows: Rows, first: int, last: int, dp_rank: int, dp_size: int) -> list[Row]:
    """This rank's part of rows first..last-1: as many for every rank, slices in rank order.

    Where they do not divide, ranks with one row less get a copy of row last-1 as a filler.
    """
    least, more = divmod(last - first, dp_size)
    begin = first + dp_rank * least + min(dp_rank, more)
    end = begin + least + (dp_rank < more)
    own = [Row(rows[row]) for row in range(begin, end)]
    return own + [Row(rows[last - 1], filler=True)] * (bool(more) and dp_rank >= more)


def micro_batches(
    dataset: TokenizedDataset,
    rows: Sequence[Row],
    micro_batch_size: int,
    *,
    packing: bool,
    pad_token_id: int,
    max_length: int,
) -> tuple[MicroBatch, ...]:
    """The rows in order, micro_batch_size at a time (the last may have fewer)."""
    return tuple(
        collate(
            dataset,
            rows[begin : begin + micro_batch_size],
            packing=packing,
            pad_token_id=pad_token_id,
            max_length=max_length,
        )
        for begin in range(0, len(rows), micro_batch_size)
    )


def padded_length(length: int, longest: int) -> int:
    """`length` rounded up to a multiple of 8, and above 64 to one of eight lengths between powers of two:
    at most an eighth is added, 4 % on average, and rows of up to 2,048 come in 48 lengths instead of 256.

    longest: of any row; nothing is padded beyond what it is rounded up to.
    """
    step = max(MULTIPLE, (1 << (length - 1).bit_length()) // (2 * SIZES))
    return min(-(-length // step) * step, -(-longest // MULTIPLE) * MULTIPLE)


def collate(
    dataset: TokenizedDataset, rows: Sequence[Row], *, packing: bool, pad_token_id: int, max_length: int
) -> MicroBatch:
    """One micro-batch, padded on the right to the `padded_length` of its longest row.

    Positions and segments are given where rows are packed.
    """
    sizes = [int(dataset.lengths[row.records].sum()) for row in rows]
    shape = (len(rows), padded_length(max(sizes), max_length))
    ids = np.full(shape, pad_token_id, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    segments = np.zeros(shape, dtype=np.int64)
    for line, row in enumerate(rows):
        begin = 0
        for segment, record in enumerate(row.records, 1):
            source = slice(dataset.offsets[record], dataset.offsets[record + 1])
            here = slice(begin, begin + source.stop - source.start)
            ids[line, here] = dataset.tokens[source]
            if not row.filler:
                labels[line, here] = dataset.labels[source]
            segments[line, here] = segment
            positions[line, here] = np.arange(source.stop - source.start)
            begin = here.stop
        positions[line, begin:] = np.arange(shape[1] - begin)
    return _pinned(
        MicroBatch(
            input_ids=torch.from_numpy(ids),
            labels=torch.from_numpy(labels),
            positions=torch.from_numpy(positions) if packing else None,
            segments=torch.from_numpy(segments) if packing else None,
            records=tuple(() if row.filler else tuple(map(dataset.origin, row.records)) for row in rows),
            tokens=sum(size for row, size in zip(rows, sizes, strict=True) if not row.filler),
            bounds=Records.of(torch.from_numpy(segments)) if packing else None,
        )
    )


def _pinned(batch: MicroBatch) -> MicroBatch:
    """The batch in page-locked memory, from which copies to the device do not block."""
    return batch.each(lambda tensor: tensor.pin_memory()) if torch.cuda.is_available() else batch
