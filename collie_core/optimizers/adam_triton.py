"""AdamW's update on CUDA in one pass over weight, gradient and states.

`ShadowedOptimizer` is the reference: it copies weight and states to fp32, lets torch update them, and rounds
what is kept in less, which reads and writes about four times as many bytes by some 25 kernels a parameter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from collie_core.ops import rounding_triton
from collie_core.ops.rounding import Counters, Noise, counters, noise_key, signed

_BLOCK = 1024
#: of each element
STATES = ("exp_avg", "exp_avg_sq")


def serves(optimizer: torch.optim.Optimizer, *tensors: Tensor) -> bool:
    """Whether the kernel does with these tensors what `optimizer`, with one parameter, would do."""
    group = optimizer.param_groups[0]
    plain = type(optimizer) is torch.optim.AdamW and not (group["amsgrad"] or group["maximize"])
    return plain and rounding_triton.serves(*tensors)


def step(
    target: Tensor,
    gradient: Tensor,
    state: Mapping[str, Tensor],
    group: Mapping[str, Any],
    source: Noise,
    *,
    finite: Tensor,
    loss_scale: float,
    clip_value: float | None,
    grad_scale: float | Tensor,
) -> None:
    """AdamW (arXiv 1711.05101, algorithm 2); where `finite` (0-d bool) is false no bit changes.

    target: the weight, of any dtype, contiguous; rounded with the noise of `source`.  gradient: of its shape;
    what is used is `clamp(gradient / loss_scale, ±clip_value) * grad_scale`.  state: `step` (0-d fp32), and
    `exp_avg` and `exp_avg_sq` of target's shape, fp32 or bf16; rounded with noise of their own names.
    group: lr, betas, eps and weight_decay.
    """
    count, (beta1, beta2) = state["step"], group["betas"]
    average, square = (state[key] for key in STATES)
    count.add_(finite)
    if not target.numel():
        return
    place = counters(target, source)
    _kernels().adamw[(-(-target.numel() // _BLOCK),)](
        target,
        gradient,
        average,
        square,
        count,
        finite,
        float(group["lr"]),
        float(group["lr"] * group["weight_decay"]),
        *rule_numbers(beta1, beta2, group["eps"]),
        float(loss_scale),
        clip_value,
        *rounding_triton.number(grad_scale),
        place.starts,
        target.numel(),
        place.length,
        place.origin,
        place.key,
        *state_noise(place, source, [f"{source.name}.{key}" for key in STATES]),
        STOCHASTIC=target.dtype == torch.bfloat16,
        STATES_STOCHASTIC=average.dtype == torch.bfloat16,
        BLOCK=_BLOCK,
    )


def rule_numbers(beta1: float, beta2: float, eps: float) -> tuple[float, ...]:
    """1 - beta and log beta of both means, and eps."""
    logs = [math.log(beta) if beta else -math.inf for beta in (beta1, beta2)]
    return 1.0 - beta1, 1.0 - beta2, *logs, float(eps)


def state_noise(place: Counters, source: Noise, names: Sequence[str]) -> Iterator[int]:
    """Origin and key of each state's noise, whose elements lie as those of the weight at `place` do."""
    shift = place.origin - noise_key(source.seed, source.step, source.name)[0]
    for name in names:
        origin, key = noise_key(source.seed, source.step, name)
        yield signed(origin + shift)
        yield key


@cache
def _kernels() -> Any:
    from collie_core.optimizers import adam_kernels

    return adam_kernels
