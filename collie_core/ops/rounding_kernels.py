# mypy: ignore-errors
"""Triton kernels of `rounding_triton`; they compute what `rounding` and `descent` say in PyTorch.

Imported only where Triton is used, which reads the functions' source and annotations: so no types here.
"""

import triton
import triton.language as tl

_SCALARS = ["length", "origin", "key"]


@triton.jit
def _noise(counter, key):
    x = counter.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15) ^ key.to(tl.uint32)) * 0xD35A2D97
    return (x ^ (x >> 15)) & 0xFFFF


@triton.jit
def _stochastic_bfloat16(value, counter, key):
    bits = value.to(tl.uint32, bitcast=True) + _noise(counter, key)
    bits = tl.where(value != value, 0x7FC00000, bits)
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _piece(numel, BLOCK: tl.constexpr):
    """(first element, offsets from it, which are inside): 64 bits for the one number that needs them."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offset = tl.arange(0, BLOCK)
    return first, offset, offset < tl.minimum(numel - first, BLOCK).to(tl.int32)


@triton.jit
def _counter(first, offset, starts, length, origin, inside):
    if starts is not None:
        index = first + offset
        return (tl.load(starts + index // length, inside) + index % length + origin).to(tl.uint32)
    return (first + origin).to(tl.uint32) + offset.to(tl.uint32)


@triton.jit
def _number(number, pointer):
    if pointer is not None:
        number = tl.load(pointer).to(tl.float32)
    return number


@triton.jit
def _true_gradient(place, inside, loss_scale, clip_value, grad_scale, grad_scale_pointer):
    """What `optimizers.gradients.scaled_gradient` says of the elements at `place`."""
    g = tl.load(place, inside, 0.0).to(tl.float32) * (1.0 / loss_scale)
    if clip_value is not None:
        g = tl.minimum(tl.maximum(g, -clip_value), clip_value)
    return g * _number(grad_scale, grad_scale_pointer)


@triton.jit(do_not_specialize=_SCALARS)
def round_to(target, value, starts, numel, length, origin, key, BLOCK: tl.constexpr):
    first, offset, inside = _piece(numel, BLOCK)
    new = tl.load(value + first + offset, inside).to(tl.float32)
    new = _stochastic_bfloat16(new, _counter(first, offset, starts, length, origin, inside), key)
    tl.store(target + first + offset, new, inside)


@triton.jit(do_not_specialize=_SCALARS)
def descend(
    target,
    direction,
    finite,
    rate,
    rate_pointer,
    decay,
    decay_pointer,
    grad_scale,
    grad_scale_pointer,
    loss_scale,
    clip_value,
    starts,
    numel,
    length,
    origin,
    key,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if tl.load(finite):
        first, offset, inside = _piece(numel, BLOCK)
        old = tl.load(target + first + offset, inside).to(tl.float32)
        place = direction + first + offset
        change = _true_gradient(place, inside, loss_scale, clip_value, grad_scale, grad_scale_pointer)
        new = old * (1.0 - _number(decay, decay_pointer)) - _number(rate, rate_pointer) * change
        if STOCHASTIC:
            counter = _counter(first, offset, starts, length, origin, inside)
            tl.store(target + first + offset, _stochastic_bfloat16(new, counter, key), inside)
        else:
            tl.store(target + first + offset, new.to(target.dtype.element_ty), inside)
