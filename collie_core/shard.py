"""The part of a parameter that one rank holds: a box of the whole tensor, whatever cut it.

Tensor parallelism, ZeRO and pipelines leave every rank one contiguous box of each parameter that it has.
The box says all that loading, rounding noise, statistics over the whole parameter and checkpoints need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.distributed import ProcessGroup

    from collie_core.models.packed import Packing


@dataclass(frozen=True)
class Piece:
    """A box of a tensor, `local`, that begins at `offsets` of a whole of `shape`."""

    local: Tensor
    shape: tuple[int, ...]
    offsets: tuple[int, ...]

    @classmethod
    def of(cls, value: Tensor | Piece) -> Piece:
        """`value` itself, or the piece that is all of a tensor."""
        return value if isinstance(value, Piece) else cls(value, tuple(value.shape), (0,) * value.ndim)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The box as an index into the whole."""
        return tuple(slice(o, o + n) for o, n in zip(self.offsets, self.local.shape, strict=True))


@dataclass(frozen=True)
class Shard:
    """This rank's box of a parameter.

    name: of the parameter in the whole model; a tied copy has the name of the original.
    local: the box itself, a leaf that optimizers update in place.
    shape, offsets: of the whole parameter, and where the box begins in it.
    cuts: (dimension, ranks among which that dimension is cut); a dimension may be cut twice.
    sums: ranks over whose gradients this box's gradient is summed to be complete.
    copies: how many ranks hold this very box.
    embedding: it is a table of token vectors, which is not decayed unless the user says so.
    packing: how it is stored, where not as numbers; shapes and offsets are those of what is stored.
    """

    name: str
    local: nn.Parameter
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    cuts: tuple[tuple[int, ProcessGroup], ...] = ()
    sums: tuple[ProcessGroup, ...] = ()
    copies: int = 1
    embedding: bool = False
    packing: Packing | None = None

    @classmethod
    def whole(cls, name: str, parameter: nn.Parameter, embedding: bool = False) -> Shard:
        """The shard of a parameter that nothing cuts."""
        return cls(name, parameter, tuple(parameter.shape), (0,) * parameter.ndim, embedding=embedding)

    def sum(self, partial: Tensor, dims: Sequence[int]) -> Tensor:
        """`partial`, a sum over this box along `dims`, completed to the sum over the whole parameter.

        Collective over the ranks that cut one of these dimensions; in place where there are any.
        """
        wanted = {dim % len(self.shape) for dim in dims} if self.shape else set()
        for dim, group in self.cuts:
            if dim in wanted:
                import torch.distributed as dist

                dist.all_reduce(partial, group=group)
        return partial

    def gathered(self) -> Tensor:
        """The whole parameter, as a new tensor, of a packed one its values in fp32; collective over the
        ranks that cut it."""
        from collie_core.models.packed import stored_bytes

        local = self.local.detach() if self.packing is None else stored_bytes(self.local)
        whole = local.clone()
        if self.cuts:
            whole = local.new_zeros(self.shape)
            whole[Piece(local, self.shape, self.offsets).slices] = local
            whole = self.sum(whole, range(len(self.shape)))
        if self.packing is None:
            return whole
        import torch

        return self.packing.unpack(whole, torch.float32)

    def piece(self, state: Tensor, dims: Sequence[int] | None = None) -> Tensor | Piece:
        """A state tensor of this box, whose dimensions are `dims` of the parameter (default: all of them)."""
        dims = range(len(self.shape)) if dims is None else dims
        shape, offsets = tuple(self.shape[dim] for dim in dims), tuple(self.offsets[dim] for dim in dims)
        return state if tuple(state.shape) == shape else Piece(state, shape, offsets)

    def cut(self, dim: int, start: int, group: ProcessGroup) -> Shard:
        """The same, its dimension `dim` now beginning `start` further and cut among `group`."""
        offsets = tuple(o + (start if d == dim else 0) for d, o in enumerate(self.offsets))
        return replace(self, offsets=offsets, cuts=(*self.cuts, (dim, group)))
