# mypy: ignore-errors
"""Triton kernels of `norm_triton`.

Imported only where Triton is used, which reads the functions' source and annotations: so no types here.
"""

import triton
import triton.language as tl


@triton.jit
def partial_squares(values, found, numel, BLOCK: tl.constexpr):
    """The sum of squares of each block, from the last to the first: what a product wrote last is in the
    cache, and the update finds what is read last here.  3 % less for both together, measured on an H200."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    first = block.to(tl.int64) * BLOCK
    offset = tl.arange(0, BLOCK)
    inside = offset < tl.minimum(numel - first, BLOCK).to(tl.int32)
    x = tl.load(values + first + offset, inside, 0.0).to(tl.float32)
    tl.store(found + block, tl.sum(x * x, 0))


@triton.jit(do_not_specialize=["blocks"])
def total_squares(found, square, finite, flag, blocks, BLOCKS: tl.constexpr):
    """Their sum, and whether it and `finite` are."""
    index = tl.arange(0, BLOCKS)
    total = tl.sum(tl.load(found + index, index < blocks, 0.0), 0)
    tl.store(square, total)
    if finite is not None:
        tl.store(flag, tl.load(finite) & (total - total == 0.0))
