"""What a block knows of the batch that it runs on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from collie_core.errors import UserError

if TYPE_CHECKING:
    from collie_core.ops.cache import LayerCache

T = TypeVar("T")


@dataclass(frozen=True)
class Records:
    """Where the records of packed rows begin when all rows are laid end to end; padding counts as a record.

    starts: int32 (N + 1,), ascending from 0 to B * S; numbers that repeat stand for records of no length.
    longest: no record has more positions; known to the host, so that nothing waits for the device.
    """

    starts: Tensor
    longest: int

    @classmethod
    def of(cls, segments: Tensor) -> Records:
        """Of `segments` (B, S) of `Context`, in host memory.

        N and `longest` are rounded up to powers of two: what is compiled for them seldom meets others.
        """
        begins = torch.ones_like(segments, dtype=torch.bool)
        begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
        starts = F.pad(begins.flatten().nonzero().squeeze(1), (0, 1), value=segments.numel())
        longest = int(starts.diff().max())
        room = _power_of_two(len(starts) - 1, 16) + 1 - len(starts)
        return cls(F.pad(starts, (0, room), value=segments.numel()).int(), _power_of_two(longest, 128))


def _power_of_two(number: int, least: int) -> int:
    return max(least, 1 << (number - 1).bit_length())


@dataclass
class Context:
    """One forward pass over B rows of S positions, after K - S positions that a cache already holds.

    input_ids: int64 (B, S).
    positions: int64 (B, S) or (1, S); for 2-D rotary (B, 2, S).
    segments: int64 (B, S), the record (1, 2, ...) of each position of a packed row, 0 on padding; or None.
    attention_mask: bool (B, K), false on padding; or None where every position is a token.
    prefix: bool (B, K), true where every later or earlier token may look (prefix language models); or None.
    cache: keys and values of the layer that is running, or None.
    positions_given: a user chose the positions; false where they are counted.
    key_positions: as `positions`, of all K keys where a cache holds some; else None.
    records: what `segments` says in the form that kernels for records of different lengths take; or None.
    """

    input_ids: Tensor
    positions: Tensor
    segments: Tensor | None = None
    attention_mask: Tensor | None = None
    prefix: Tensor | None = None
    cache: LayerCache | None = None
    positions_given: bool = False
    key_positions: Tensor | None = None
    records: Records | None = None
    _shared: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def build(
        cls,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        segments: Tensor | None = None,
        records: Records | None = None,
    ) -> Context:
        """The context of a batch.  Positions count over the whole row, in packed rows over each record,
        unless `position_ids` says otherwise.

        attention_mask is (B, K), 1 or true for a token; where all are tokens it is dropped, which waits for
        the device.  Training says what is padding by `segments`, which never does.
        Raises UserError for a mask of another shape.
        """
        given = position_ids is not None and segments is None  # a packed row's are the engine's
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
            if segments is not None:
                begins = segments != segments.roll(1, 1)
                position_ids = position_ids - (begins * position_ids).cummax(1).values
        if attention_mask is not None:
            rows, length = input_ids.shape
            shape = tuple(attention_mask.shape)
            if len(shape) != 2 or shape[0] != rows or shape[1] < length:
                raise UserError(f"attention_mask: expected (batch, length) = ({rows}, {length}), got {shape}")
            attention_mask = attention_mask.to(device=input_ids.device, dtype=torch.bool)
            if bool(attention_mask.all()):
                attention_mask = None
        positions = position_ids.to(input_ids.device)
        return cls(input_ids, positions, segments, attention_mask, positions_given=given, records=records)

    def memo(self, key: str, make: Callable[[], T]) -> T:
        """The value that `make` returns, made once a forward pass and shared by all blocks."""
        if key not in self._shared:
            self._shared[key] = make()
        value: T = self._shared[key]
        return value

    def following(self, input_ids: Tensor, positions: Tensor) -> Context:
        """The pass over `input_ids` (B, S) that comes after this one: tokens, and part of no prefix."""
        mask, prefix = (
            None if known is None else F.pad(known, (0, input_ids.shape[1]), value=value)
            for known, value in ((self.attention_mask, True), (self.prefix, False))
        )
        before = self.positions if self.key_positions is None else self.key_positions
        keys = torch.cat([before, positions], -1)
        return Context(input_ids, positions, attention_mask=mask, prefix=prefix, key_positions=keys)

    def with_cache(self, cache: LayerCache) -> Context:
        """The same context (what is memoised too) for the layer that `cache` belongs to."""
        return replace(self, cache=cache)
