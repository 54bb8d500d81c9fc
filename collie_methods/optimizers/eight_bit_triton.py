"""AdamW with 8-bit states on CUDA in one pass over weight, gradient, codes and scales.

`RuledOptimizer` over `EightBit` stores is the reference, which reads and writes about fifty times as many
bytes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor, bfloat16

from collie_core.ops import rounding_triton
from collie_core.ops.rounding import Noise, counters
from collie_core.optimizers.adam_triton import rule_numbers, state_noise
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
    blocks, rows = target.numel() // average.block, _ELEMENTS // average.block
    _kernels().adamw[(-(-blocks // rows),)](
        target,
        gradient,
        *(average.codes, average.scale, average.map),
        *(square.codes, square.scale, square.map),
        count,
        finite,
        *(float(rate) for rate in rates),
        *rule_numbers(rule.beta1, rule.beta2, rule.eps),
        float(loss_scale),
        clip_value,
        *rounding_triton.number(grad_scale),
        place.starts,
        blocks,
        place.length,
        place.origin,
        place.key,
        *state_noise(place, source, [average.name, square.name]),
        STOCHASTIC=target.dtype == bfloat16,
        ROWS=rows,
        BLOCK=average.block,
    )


@cache
def _kernels() -> Any:
    from collie_methods.optimizers import eight_bit_kernels

    return eight_bit_kernels
