"""Weights that are stored packed, as a few bits an element with scales, and never whole in memory.

A packing keeps a matrix (outputs, inputs) as uint8 (outputs, columns), row by row and block by block: a row
is packed by itself, and the blocks of a row lie one after the other, scales beside codes.  So whatever cuts
rows, or inputs between blocks, cuts the packed matrix alike, and one parameter keeps its one name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from collie_core.errors import ConfigError, PluginError

if TYPE_CHECKING:
    from collie_core.models.weight_map import ParallelPlan
    from collie_core.shard import Piece

#: Elements packed at once, by device: some 25 bytes for each are taken, and on CUDA launches take the time.
_CHUNK = {"cpu": 2**18, "cuda": 2**22}


class Packing(Protocol):
    """How the rows of a matrix are stored.

    section: the entry of `adapters:` that packs so.  block: inputs that are packed together.  block_bytes:
    what they become.
    """

    @property
    def section(self) -> Mapping[str, Any]: ...
    @property
    def block(self) -> int: ...
    @property
    def block_bytes(self) -> int: ...

    def pack(self, values: Tensor) -> Tensor:
        """values fp32 (rows, inputs) -> uint8 (rows, inputs / block * block_bytes)."""

    def unpack(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse, as far as there is one, in `dtype`."""


class _Product(torch.autograd.Function):
    """x (..., inputs) times a packed weight, transposed; only the packed one is kept for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stored: Tensor, packing: Packing) -> Tensor:
        ctx.save_for_backward(stored)
        ctx.packing = packing
        return F.linear(x, packing.unpack(stored, x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (stored,) = ctx.saved_tensors
        return gradient @ ctx.packing.unpack(stored, gradient.dtype), None, None


def packed_product(x: Tensor, stored: Tensor, packing: Packing) -> Tensor:
    """x (..., inputs) -> (..., outputs), in the dtype of x; the weight has no gradient."""
    stored = stored_bytes(stored)
    if torch.compiler.is_compiling():
        # the compiler would make one of the two unpackings of `_Product`, and keep the whole weight
        weight = checkpoint(packing.unpack, stored, x.dtype, use_reentrant=False, preserve_rng_state=False)
        return F.linear(x, weight)
    return cast(Tensor, _Product.apply(x, stored, packing))


def stored_bytes(weight: Tensor) -> Tensor:
    """uint8: what a packing stored, whatever dtype of one byte the layout keeps it in."""
    return weight.detach().view(torch.uint8)


def packed_columns(packing: Packing | None, inputs: int) -> int:
    """Stored columns of so many inputs: whole blocks, where there is a packing."""
    return inputs if packing is None else inputs // packing.block * packing.block_bytes


def unpacked_shape(packing: Packing, shape: torch.Size | tuple[int, ...]) -> torch.Size:
    """Shape (or offsets) of the matrix whose packed one has this shape (or offsets)."""
    return torch.Size((shape[0], shape[1] // packing.block_bytes * packing.block))


def pack_linear(model: nn.Module, path: str, packing: Packing) -> None:
    """Store the weight of the linear at `path` packed, and frozen.  It may be on meta.

    The module's `base_sections` then names the packing's section.
    Raises ConfigError where its inputs are no whole blocks, PluginError where it is packed already.
    """
    from collie_core.models.adapted import adapted_linear

    linear = adapted_linear(model, path)
    if linear.packing is not None:
        raise PluginError(f"{path} is quantised already")
    if linear.in_features % packing.block:
        raise ConfigError(
            f"{path} has {linear.in_features} inputs, no multiple of the block of {packing.block} that is "
            "quantised together"
        )
    values = linear.weight.detach()
    linear.unpacked_dtype, linear.packing = values.dtype, packing
    stored = values.new_empty(
        (linear.out_features, packed_columns(packing, linear.in_features)), dtype=torch.uint8
    )
    if not values.is_meta:
        pack_rows(packing, stored, lambda rows: values[rows])
    linear.weight = nn.Parameter(stored, requires_grad=False)
    sections = getattr(model, "base_sections", ())
    if packing.section not in sections:
        model.base_sections = (*sections, packing.section)  # type: ignore[assignment]


def unpack_linears(model: nn.Module) -> None:
    """Weights again, of the values that the packed ones stand for, in the dtype of the model."""
    from collie_core.models.adapted import AdaptedLinear

    dtypes = [p.dtype for p in model.parameters() if p.dtype.is_floating_point]
    for module in model.modules():
        if isinstance(module, AdaptedLinear) and module.packing is not None:
            values = module.packing.unpack(stored_bytes(module.weight), dtypes[0])
            module.packing, module.weight = None, nn.Parameter(values, requires_grad=False)
    model.base_sections = ()  # type: ignore[assignment]


def packings(model: nn.Module) -> dict[str, Packing]:
    """The packing of each parameter that has one."""
    return {
        f"{path}.weight": packing
        for path, module in model.named_modules(remove_duplicate=False)
        if (packing := getattr(module, "packing", None)) is not None
    }


def unpacked_size(module: nn.Module) -> int:
    """Elements of all parameters, packed ones counted as the weights that they stand for."""
    packed = packings(module)
    return sum(
        (unpacked_shape(packed[name], parameter.shape) if name in packed else parameter.shape).numel()
        for name, parameter in module.named_parameters()
    )


def pack_rows(packing: Packing, stored: Tensor, values: Callable[[slice], Tensor]) -> None:
    """Fill `stored` with what `values` gives for its rows, a few at a time; packed on its device, from fp32.

    The dtype of the model does not matter, so that values are the same whatever it is.
    """
    stored = stored_bytes(stored)
    inputs = unpacked_shape(packing, stored.shape)[1]
    height = max(1, _CHUNK.get(stored.device.type, _CHUNK["cpu"]) // max(1, inputs))
    for begin in range(0, stored.shape[0], height):
        rows = slice(begin, min(begin + height, stored.shape[0]))
        stored[rows] = packing.pack(values(rows).to(stored.device, torch.float32).contiguous())


def pack_piece(packing: Packing, piece: Piece, fill: Callable[[Piece], None]) -> None:
    """Fill a piece of a packed matrix; `fill` gives the values of pieces, fp32 on the CPU, of the matrix."""
    from collie_core.shard import Piece

    shape = tuple(unpacked_shape(packing, piece.shape))
    row, column = unpacked_shape(packing, piece.offsets)
    width = unpacked_shape(packing, piece.local.shape)[1]

    def values(rows: slice) -> Tensor:
        part = torch.empty(rows.stop - rows.start, width)
        fill(Piece(part, shape, (row + rows.start, column)))
        return part

    pack_rows(packing, piece.local, values)


def check_blocks(model: nn.Module, plan: ParallelPlan, size: int) -> None:
    """Raises ConfigError where `size` tensor-parallel ranks would cut the inputs of a linear in a block."""
    for name, packing in packings(model).items():
        path = name.removesuffix(".weight")
        inputs = cast(nn.Linear, model.get_submodule(path)).in_features
        cut = any(fnmatchcase(name, pattern) for pattern in plan.rows) and not any(
            fnmatchcase(name, pattern) for pattern in plan.whole
        )
        if cut and inputs % (size * packing.block):
            raise ConfigError(
                f"tp_size {size} cuts the {inputs} inputs of {path} into parts that are no multiple of the "
                f"block of {packing.block} that is quantised together; expected another tp_size, "
                "another block_size, or this linear in skip_modules"
            )
