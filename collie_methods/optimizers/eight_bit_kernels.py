# mypy: ignore-errors
"""The Triton kernel of `eight_bit_triton`.

Imported only where Triton is used, which reads the functions' source and annotations: so no types here.
A program works on ROWS blocks of BLOCK elements, which share a scale each.
"""

import triton
import triton.language as tl

from collie_core.ops.rounding_kernels import _counter, _noise, _stochastic_bfloat16, _true_gradient
from collie_core.optimizers.adam_kernels import _updated


@triton.jit
def _encoded(value, scale, map, counter, key):
    """The codes of value / scale: one of both neighbours in the ascending `map`, by chance."""
    x = value / scale
    x = tl.where(x == x, x, 0.0)  # 0 / 0
    low = tl.zeros_like(x).to(tl.int32)
    for halving in tl.static_range(8):  # the last of 256 codes whose value is not above x, or the first
        higher = low + (128 >> halving)
        low = tl.where(tl.load(map + higher) <= x, higher, low)
    high = tl.minimum(low + 1, 255)
    below, above = tl.load(map + low), tl.load(map + high)
    up = above - x < x - below  # the nearest is the higher one
    near = tl.where(up, above, below)
    other = tl.where(up, below, above)
    share = tl.where(other == near, 0.0, (x - near) / (other - near))
    draw = _noise(counter, key).to(tl.float32) / 65536.0
    return tl.where((draw < share) != up, high, low)


@triton.jit(
    do_not_specialize=["rate", "decay", "grad_scale", "length", "origin", "key"]
    + ["average_origin", "average_key", "square_origin", "square_key"]
)
def adamw(
    target,
    gradient,
    average,
    average_scale,
    average_map,
    square,
    square_scale,
    square_map,
    count,
    finite,
    rate,
    decay,
    weight1,
    weight2,
    log_beta1,
    log_beta2,
    eps,
    loss_scale,
    clip_value,
    grad_scale,
    grad_scale_pointer,
    starts,
    blocks,
    length,
    origin,
    key,
    average_origin,
    average_key,
    square_origin,
    square_key,
    STOCHASTIC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if tl.load(finite):
        block = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        there = block < blocks
        first = tl.program_id(0).to(tl.int64) * (ROWS * BLOCK)
        offset = tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = there[:, None]
        place = gradient + first + offset
        g = _true_gradient(place, inside, loss_scale, clip_value, grad_scale, grad_scale_pointer)
        old = tl.load(target + first + offset, inside, 0.0).to(tl.float32)
        m = tl.load(average_map + tl.load(average + first + offset, inside, 0).to(tl.int32))
        v = tl.load(square_map + tl.load(square + first + offset, inside, 0).to(tl.int32))
        m *= tl.load(average_scale + block, there, 0.0)[:, None]
        v *= tl.load(square_scale + block, there, 0.0)[:, None]
        new, m, v = _updated(old, g, m, v, count, rate, decay, weight1, weight2, log_beta1, log_beta2, eps)
        counter = _counter(first, offset, starts, length, 0, inside)
        scale = tl.max(tl.abs(m), 1)
        at = counter + average_origin.to(tl.uint32)
        codes = _encoded(m, scale[:, None], average_map, at, average_key)
        tl.store(average_scale + block, scale, there)
        tl.store(average + first + offset, codes.to(tl.uint8), inside)
        scale = tl.max(v, 1)
        at = counter + square_origin.to(tl.uint32)
        codes = _encoded(v, scale[:, None], square_map, at, square_key)
        tl.store(square_scale + block, scale, there)
        tl.store(square + first + offset, codes.to(tl.uint8), inside)
        if STOCHASTIC:
            new = _stochastic_bfloat16(new, counter + origin.to(tl.uint32), key)
        tl.store(target + first + offset, new.to(target.dtype.element_ty), inside)
