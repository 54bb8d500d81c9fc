# mypy: ignore-errors
"""Triton kernels of `norm_triton`.

Imported only where Triton is used, which reads the functions' source and annotations: so no types here.
"""

import triton
import triton.language as tl


@triton.jit
def partial_squares(tensors, numels, firsts, found, BLOCK: tl.constexpr):
    """The sum of squares of each block of elements; those of tensor i begin at block firsts[i].

    From the last to the first: what a product wrote last is in the cache, and the update finds what is read
    last here.  3 % less for both together, measured on an H200."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    offset = tl.arange(0, BLOCK)
    for i in tl.static_range(len(numels)):
        if (block >= firsts[i]) & (block < firsts[i + 1]):
            first = (block - firsts[i]).to(tl.int64) * BLOCK
            inside = offset < tl.minimum(numels[i] - first, BLOCK).to(tl.int32)
            x = tl.load(tensors[i] + first + offset, inside, 0.0).to(tl.float32)
            tl.store(found + block, tl.sum(x * x, 0))


@triton.jit
def total_squares(found, firsts, squares, finite, flags, BLOCKS: tl.constexpr):
    """The sum of each tensor's blocks, at most BLOCKS, and whether it and `finite` are."""
    tensor = tl.program_id(0)
    index = tl.arange(0, BLOCKS)
    for i in tl.static_range(len(firsts) - 1):
        if tensor == i:
            total = tl.sum(tl.load(found + firsts[i] + index, index < firsts[i + 1] - firsts[i], 0.0), 0)
            tl.store(squares + i, total)
            if finite is not None:
                tl.store(flags + i, tl.load(finite) & (total - total == 0.0))
