"""What a block knows of the batch that it runs on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collie_core.ops.cache import LayerCache

T = TypeVar("T")


@dataclass
class Context:
    """One forward pass over B rows of S positions, after K - S positions that a cache already holds.

    input_ids: int64 (B, S).
    positions: int64 (B, S) or (1, S); for 2-D rotary (B, 2, S).
    segments: int64 (B, S), the record (1, 2, ...) of each position of a packed row, 0 on padding; or None.
    attention_mask: bool (B, K), false on padding; or None where every position is a token.
    prefix: bool (B, K), true where every later or earlier token may look (prefix language models); or None.
    cache: keys and values of the layer that is running, or None.
    """

    input_ids: Tensor
    positions: Tensor
    segments: Tensor | None = None
    attention_mask: Tensor | None = None
    prefix: Tensor | None = None
    cache: LayerCache | None = None
    _shared: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def build(
        cls,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Context:
        """The context of a batch.  Positions count over the whole row, in packed rows over each record,
        unless `position_ids` says otherwise.

        attention_mask is (B, K), 1 or true for a token; where all are tokens it is dropped, which waits for
        the device.  Training says what is padding by `segments`, which never does.
        """
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
            if segments is not None:
                begins = segments != segments.roll(1, 1)
                position_ids = position_ids - (begins * position_ids).cummax(1).values
        if attention_mask is not None:
            attention_mask = attention_mask.to(device=input_ids.device, dtype=torch.bool)
            if bool(attention_mask.all()):
                attention_mask = None
        return cls(input_ids, position_ids.to(input_ids.device), segments, attention_mask)

    def memo(self, key: str, make: Callable[[], T]) -> T:
        """The value that `make` returns, made once a forward pass and shared by all blocks."""
        if key not in self._shared:
            self._shared[key] = make()
        value: T = self._shared[key]
        return value

    def with_cache(self, cache: LayerCache) -> Context:
        """The same context (what is memoised too) for the layer that `cache` belongs to."""
        return replace(self, cache=cache)
