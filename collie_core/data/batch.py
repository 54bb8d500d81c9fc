"""What a training step consumes: micro-batches of rows, grouped into the batch of one optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from collie_core.ops.context import Records


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass, right-padded to the same length.

    input_ids: int64 (rows, length).
    labels: int64 (rows, length), unshifted; -100 where no loss is wanted, always so at the first token of
        a record, so the shift by one inside the model never crosses records.
    positions: int64 (rows, length), restarting at each record of a packed row; None means 0..length-1.
    segments: int64 (rows, length), 1, 2, ... for the records of a packed row, 0 on padding; None where
        every row is one record (padding on the right is then harmless under causal attention).
    bounds: what segments say, as kernels take it; None where segments are None.
    records: for each row the sources of its records, such as `data/train.jsonl:17`, for messages.
    tokens: tokens that are not padding.
    """

    input_ids: Tensor
    labels: Tensor
    positions: Tensor | None
    segments: Tensor | None
    records: tuple[tuple[str, ...], ...]
    tokens: int
    bounds: Records | None = None

    def to(self, device: torch.device) -> MicroBatch:
        """The same batch on `device` (copied without blocking)."""

        return self.each(lambda tensor: tensor.to(device, non_blocking=True))

    def each(self, change: Callable[[Tensor], Tensor]) -> MicroBatch:
        """The same batch with every tensor changed."""
        bounds = self.bounds
        return replace(
            self,
            input_ids=change(self.input_ids),
            labels=change(self.labels),
            positions=None if self.positions is None else change(self.positions),
            segments=None if self.segments is None else change(self.segments),
            bounds=None if bounds is None else replace(bounds, starts=change(bounds.starts)),
        )

    @property
    def target_tokens(self) -> int:
        """Tokens with a loss."""
        return int((self.labels[:, 1:] != -100).sum())


@dataclass(frozen=True)
class StepBatch:
    """All micro-batches of one optimizer step on this rank.

    step counts from 1; epoch from 0.  target_tokens is the sum over all data-parallel ranks: the number
    that each summed loss is divided by.  tokens, without padding, is over all of them too.
    """

    step: int
    epoch: int
    micro_batches: tuple[MicroBatch, ...]
    target_tokens: int
    tokens: int
