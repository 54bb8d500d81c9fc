"""Block inputs in host memory between forward and backward, copied while other blocks compute."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

if TYPE_CHECKING:
    from collie_core.layouts.recompute import RecomputedBlock
    from collie_core.ops import Context


class Offloaded:
    """Recomputes blocks in the backward pass, from their inputs in page-locked host memory.

    A side stream copies a block's input out while the block computes, and that of the block before back in
    while the block is recomputed and differentiated.  The last block's input stays: it is needed at once.
    The buffers in host memory are used again, step after step.
    """

    def __init__(
        self, blocks: list[nn.Module], device: torch.device, again: RecomputedBlock, last_too: bool = True
    ) -> None:
        """again: runs a block whose backward pass computes it again.  last_too: false where the last block's
        backward pass follows its forward pass: recomputed it would take as much memory a moment later."""
        self.blocks, self._again, self._last_too = blocks, again, last_too
        self._host = _HostBuffers(torch.cuda.Stream(device))

    @property
    def host_bytes(self) -> int:
        """Page-locked memory that is held, while no graph is alive."""
        return self._host.size

    def __call__(self, h: Tensor, context: Context) -> Tensor:
        """h (B, S, E) -> (B, S, E)."""
        before: _Input | None = None
        for index, block in enumerate(self.blocks):
            last = index == len(self.blocks) - 1
            kept = _Input(self._host, h, before, stays=last)
            with saved_tensors_hooks(kept.pack, kept.unpack):
                plain = last and not self._last_too
                h = block(h, context) if plain else self._again(block, h, context)
            before = kept
        return h


class _HostBuffers:
    """Page-locked buffers of bytes that are free, and the stream on which all copies are in order.

    A buffer may be taken again while its last copy is under way: the next one waits for it on the stream.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream
        self._free: list[Tensor] = []

    @property
    def size(self) -> int:
        """Bytes that are free."""
        return sum(buffer.numel() for buffer in self._free)

    def take(self, size: int) -> Tensor:
        """One of at least `size` bytes: the smallest free one, else a new one in place of the largest."""
        self._free.sort(key=Tensor.numel)
        for index, buffer in enumerate(self._free):
            if buffer.numel() >= size:
                return self._free.pop(index)
        if self._free:
            self._free.pop()
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def give_back(self, buffer: Tensor) -> None:
        """It is free, but for copies that are under way."""
        self._free.append(buffer)


class _Input:
    """A block's input between its forward and backward pass.

    It lives as long as the graph that needs it; its buffer is then given back, whether it was used or not.
    """

    def __init__(self, host: _HostBuffers, h: Tensor, before: _Input | None, stays: bool) -> None:
        self._host, self._before, self._stays = host, before, stays
        self._place = h.data_ptr()
        self._there: Tensor | None = None  # on the device
        self._buffer: Tensor | None = None
        self._copied = torch.cuda.Event()  # the last copy is done
        self._shape, self._dtype = h.shape, h.dtype

    def pack(self, tensor: Tensor) -> Tensor | None:
        """What autograd keeps of a saved tensor: nothing of the block's input, where that does not stay."""
        if not self._is(tensor):
            return tensor
        if self._before is not None:
            self._before.let_go()
        if self._stays:
            return tensor
        if self._there is None:
            self._there = tensor
            self._copy_out(tensor)
        return None

    def unpack(self, kept: Tensor | None) -> Tensor:
        """The tensor; the input of the block before is then on its way."""
        if kept is None:
            self.fetch()
            torch.cuda.current_stream().wait_event(self._copied)
        elif not (self._stays and self._is(kept)):
            return kept
        if self._before is not None:
            self._before.fetch()
        there = self._there if kept is None else kept
        assert there is not None
        self._there = None  # whoever asked for it holds it
        return there

    def _is(self, tensor: Tensor) -> bool:
        return tensor.data_ptr() == self._place and tensor.shape == self._shape and tensor.numel() > 0

    def let_go(self) -> None:
        """Free the device's copy: what computes next waits until it is in host memory."""
        if self._there is not None:
            torch.cuda.current_stream().wait_event(self._copied)
            self._there = None

    def fetch(self) -> None:
        """Begin to copy it to the device, where it is not."""
        if self._there is not None:
            return
        assert self._buffer is not None
        stream = self._host.stream
        there = torch.empty(self._shape, dtype=self._dtype, device=stream.device)
        stream.wait_stream(torch.cuda.current_stream())  # until then its memory may be another's
        with torch.cuda.stream(stream):
            there.copy_(self._view(self._buffer), non_blocking=True)
            self._copied.record()
        there.record_stream(stream)  # a graph that is dropped now frees it before it is written
        self._there = there

    def _copy_out(self, tensor: Tensor) -> None:
        self._buffer = self._host.take(tensor.numel() * tensor.element_size())
        stream = self._host.stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._view(self._buffer).copy_(tensor, non_blocking=True)
            self._copied.record()

    def _view(self, buffer: Tensor) -> Tensor:
        size = self._shape.numel() * self._dtype.itemsize
        return buffer[:size].view(self._dtype).view(self._shape)

    def __del__(self) -> None:
        if self._buffer is not None:
            self._host.give_back(self._buffer)
