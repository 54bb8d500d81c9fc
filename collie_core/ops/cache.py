"""Keys and values of the positions that a generation has already seen."""

from __future__ import annotations

import torch
from torch import Tensor


class LayerCache:
    """Keys and values (B, heads, positions, width) of one layer, in buffers that grow by doubling."""

    def __init__(self, capacity: int = 256) -> None:
        """capacity: positions to reserve at first; the number that will be needed, where it is known."""
        self.length = 0
        self._capacity = capacity
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add S positions, and return the keys and values of all positions so far (views of the buffers)."""
        end = self.length + keys.shape[2]
        self._keys = self._room(self._keys, keys, end)
        self._values = self._room(self._values, values, end)
        self._keys[:, :, self.length : end] = keys
        self._values[:, :, self.length : end] = values
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def _room(self, buffer: Tensor | None, new: Tensor, end: int) -> Tensor:
        if buffer is not None and end <= buffer.shape[2]:
            return buffer
        while self._capacity < end:
            self._capacity *= 2
        batch, heads, _, width = new.shape
        grown = torch.empty(batch, heads, self._capacity, width, dtype=new.dtype, device=new.device)
        if buffer is not None:
            grown[:, :, : self.length] = buffer[:, :, : self.length]
        return grown


class KVCache:
    """One `LayerCache` a block, by the block's key."""

    def __init__(self, blocks: list[str], capacity: int = 256) -> None:
        self.layers = {name: LayerCache(capacity) for name in blocks}

    @property
    def length(self) -> int:
        """Positions held."""
        return next(iter(self.layers.values())).length if self.layers else 0
