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
def _piece(block, numel, BLOCK: tl.constexpr):
    """(first element, offsets from it, which are inside): 64 bits for the one number that needs them."""
    first = block.to(tl.int64) * BLOCK
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


@triton.jit
def _descend(place, inside, change, rate, decay, counter, key):
    """The elements at `place`, rounded as their dtype wants it."""
    dtype: tl.constexpr = place.dtype.element_ty
    new = tl.load(place, inside).to(tl.float32) * (1.0 - decay) - rate * change
    if dtype == tl.bfloat16:
        tl.store(place, _stochastic_bfloat16(new, counter, key), inside)
    else:
        tl.store(place, new.to(dtype), inside)


@triton.jit(do_not_specialize=_SCALARS)
def round_to(target, value, starts, numel, length, origin, key, BLOCK: tl.constexpr):
    first, offset, inside = _piece(tl.program_id(0), numel, BLOCK)
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
    BLOCK: tl.constexpr,
):
    if tl.load(finite):
        first, offset, inside = _piece(tl.program_id(0), numel, BLOCK)
        place = direction + first + offset
        change = _true_gradient(place, inside, loss_scale, clip_value, grad_scale, grad_scale_pointer)
        counter = _counter(first, offset, starts, length, origin, inside)
        rate, decay = _number(rate, rate_pointer), _number(decay, decay_pointer)
        _descend(target + first + offset, inside, change, rate, decay, counter, key)


@triton.jit
def descend_together(
    targets,
    directions,
    finite,
    rates,
    decays,
    grad_scale,
    grad_scale_pointer,
    loss_scale,
    clip_value,
    numels,
    firsts,
    origins,
    keys,
    BLOCK: tl.constexpr,
):
    """`descend` of whole tensors; the blocks of tensor i begin at firsts[i].  origins, keys: as `_odd` gives
    them."""
    block = tl.program_id(0)
    for i in tl.static_range(len(numels)):
        if (block >= firsts[i]) & (block < firsts[i + 1]):
            first, offset, inside = _piece(block - firsts[i], numels[i], BLOCK)
            inside &= tl.load(finite + i)
            place = directions[i] + first + offset
            change = _true_gradient(place, inside, loss_scale, clip_value, grad_scale, grad_scale_pointer)
            counter = _counter(first, offset, None, 0, origins[i] >> 1, inside)
            target = targets[i] + first + offset
            _descend(target, inside, change, rates[i], decays[i], counter, keys[i] >> 1)
