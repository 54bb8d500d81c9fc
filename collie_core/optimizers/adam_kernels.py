# mypy: ignore-errors
"""The Triton kernel of `adam_triton`.

Imported only where Triton is used, which reads the function's source and annotations: so no types here.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from collie_core.ops.rounding_kernels import _counter, _piece, _stochastic_bfloat16, _true_gradient

_SCALARS = ["rate", "decay", "grad_scale", "length", "origin", "key", "average_origin"]
_SCALARS += ["average_key", "square_origin", "square_key"]


@triton.jit
def _updated(old, g, m, v, count, rate, decay, weight1, weight2, log_beta1, log_beta2, eps):
    """(weight, mean, mean square) after update number `count`; fp32."""
    steps = tl.load(count)
    # 1 - beta^t: the difference itself would lose digits while beta^t is close to 1
    step_size = rate / -libdevice.expm1(steps * log_beta1)
    correction = 1.0 / -libdevice.expm1(steps * log_beta2)
    m += weight1 * (g - m)
    v += weight2 * (g * g - v)
    return old * (1.0 - decay) - step_size * (m / (tl.sqrt(v * correction) + eps)), m, v


@triton.jit(do_not_specialize=_SCALARS)
def adamw(
    target,
    gradient,
    average,
    square,
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
    numel,
    length,
    origin,
    key,
    average_origin,
    average_key,
    square_origin,
    square_key,
    STOCHASTIC: tl.constexpr,
    STATES_STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if tl.load(finite):
        first, offset, inside = _piece(tl.program_id(0), numel, BLOCK)
        place = gradient + first + offset
        g = _true_gradient(place, inside, loss_scale, clip_value, grad_scale, grad_scale_pointer)
        old = tl.load(target + first + offset, inside, 0.0).to(tl.float32)
        m = tl.load(average + first + offset, inside, 0.0).to(tl.float32)
        v = tl.load(square + first + offset, inside, 0.0).to(tl.float32)
        new, m, v = _updated(old, g, m, v, count, rate, decay, weight1, weight2, log_beta1, log_beta2, eps)
        counter = _counter(first, offset, starts, length, 0, inside)
        if STATES_STOCHASTIC:
            m = _stochastic_bfloat16(m, counter + average_origin.to(tl.uint32), average_key)
            v = _stochastic_bfloat16(v, counter + square_origin.to(tl.uint32), square_key)
        tl.store(average + first + offset, m.to(average.dtype.element_ty), inside)
        tl.store(square + first + offset, v.to(square.dtype.element_ty), inside)
        if STOCHASTIC:
            new = _stochastic_bfloat16(new, counter + origin.to(tl.uint32), key)
        tl.store(target + first + offset, new.to(target.dtype.element_ty), inside)
