# mypy: ignore-errors
"""Triton kernels of `norm_triton`.

Imported only where Triton is used, which reads the functions' source and annotations: so no types here.
"""

import triton
import triton.language as tl

from collie_core.ops.rounding_kernels import _piece


@triton.jit
def partial_squares(values, found, numel, BLOCK: tl.constexpr):
    """The sum of squares of each block."""
    first, offset, inside = _piece(numel, BLOCK)
    x = tl.load(values + first + offset, inside, 0.0).to(tl.float32)
    tl.store(found + tl.program_id(0), tl.sum(x * x, 0))


@triton.jit(do_not_specialize=["blocks"])
def total_squares(found, square, finite, flag, blocks, BLOCKS: tl.constexpr):
    """Their sum, and whether it and `finite` are."""
    index = tl.arange(0, BLOCKS)
    total = tl.sum(tl.load(found + index, index < blocks, 0.0), 0)
    tl.store(square, total)
    if finite is not None:
        tl.store(flag, tl.load(finite) & (total - total == 0.0))
