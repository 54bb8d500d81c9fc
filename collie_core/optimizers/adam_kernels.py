# mypy: ignore-errors
"""The Triton kernel of `adam_triton`.

Imported only where Triton is used, which reads the function's source and annotations: so no types here.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from collie_core.ops.rounding_kernels import _counter, _number, _stochastic_bfloat16

_SCALARS = ["rate", "decay", "grad_scale", "numel", "length", "origin", "key", "average_origin"]
_SCALARS += ["average_key", "square_origin", "square_key"]


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
        index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = index < numel
        steps = tl.load(count)
        g = tl.load(gradient + index, inside, 0.0).to(tl.float32) / loss_scale
        if clip_value is not None:
            g = tl.minimum(tl.maximum(g, -clip_value), clip_value)
        g *= _number(grad_scale, grad_scale_pointer)
        old = tl.load(target + index, inside, 0.0).to(tl.float32)
        m = tl.load(average + index, inside, 0.0).to(tl.float32)
        v = tl.load(square + index, inside, 0.0).to(tl.float32)
        m += weight1 * (g - m)
        v += weight2 * (g * g - v)
        # 1 - beta^t: the difference itself would lose digits while beta^t is close to 1
        correction1 = -libdevice.expm1(steps * log_beta1)
        correction2 = -libdevice.expm1(steps * log_beta2)
        denominator = tl.sqrt(v / correction2) + eps
        new = old * (1.0 - decay) - rate / correction1 * (m / denominator)
        counter = _counter(index, starts, length, 0, inside)
        if STATES_STOCHASTIC:
            tl.store(average + index, _stochastic_bfloat16(m, counter + average_origin, average_key), inside)
            tl.store(square + index, _stochastic_bfloat16(v, counter + square_origin, square_key), inside)
        else:
            tl.store(average + index, m.to(average.dtype.element_ty), inside)
            tl.store(square + index, v.to(square.dtype.element_ty), inside)
        if STOCHASTIC:
            tl.store(target + index, _stochastic_bfloat16(new, counter + origin, key), inside)
        else:
            tl.store(target + index, new.to(target.dtype.element_ty), inside)
