"""AdamW with 8-bit states on CUDA in one pass over weight, gradient, codes and scales.

`RuledOptimizer` over `EightBit` stores is the reference, which reads and writes about fifty times as many
bytes.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from torch import Tensor, bfloat16

from collie_core.ops import rounding_triton
from collie_core.ops.rounding import Noise, counters, noise_key, signed
from collie_methods.optimizers.rules import AdamW
from collie_methods.optimizers.stores import EightBit

_ELEMENTS = 1024  # of a program


def serves(target: Tensor, gradient: Tensor, finite: Tensor) -> bool:
    """Whether the kernel can be used."""
    return rounding_triton.serves(target, gradient, finite)


def step(
    target: Tensor,
    gradient: Tensor,
    average: EightBit,
    square: EightBit,
    count: Tensor,
    rule: AdamW,
    rates: tuple[float, float],
    source: Noise,
    *,
    finite: Tensor,
    loss_scale: float,
    clip_value: float | None,
    grad_scale: float | Tensor,
) -> None:
    """The rule's update number `count` (0-d fp32); where `finite` (0-d bool) is false no bit changes.

    target: the weight, of any dtype, contiguous; rounded with the noise of `source`.  gradient: of its shape;
    what is used is `clamp(gradient / loss_scale, ±clip_value) * grad_scale`.  average, square: the states of
    target's elements.  rates: rate and decay of `p (1 - decay) - rate * direction`.
    """
    if not target.numel():
        return
    place = counters(target, source)
    shift = place.origin - noise_key(source.seed, source.step, source.name)[0]
    kept = [noise_key(source.seed, source.step, store.name) for store in (average, square)]
    (average_origin, average_key), (square_origin, square_key) = kept
    blocks, rows = target.numel() // average.block, _ELEMENTS // average.block
    _kernels().adamw[(-(-blocks // rows),)](
        target,
        gradient,
        *(average.codes, average.scale, average.map),
        *(square.codes, square.scale, square.map),
        count,
        finite,
        *(float(rate) for rate in rates),
        1.0 - rule.beta1,
        1.0 - rule.beta2,
        math.log(rule.beta1) if rule.beta1 else -math.inf,
        math.log(rule.beta2) if rule.beta2 else -math.inf,
        float(rule.eps),
        float(loss_scale),
        clip_value,
        *rounding_triton.number(grad_scale),
        place.starts,
        blocks,
        place.length,
        place.origin,
        place.key,
        signed(average_origin + shift),
        average_key,
        signed(square_origin + shift),
        square_key,
        STOCHASTIC=target.dtype == bfloat16,
        ROWS=rows,
        BLOCK=average.block,
    )


@cache
def _kernels() -> Any:
    from collie_methods.optimizers import eight_bit_kernels

    return eight_bit_kernels
