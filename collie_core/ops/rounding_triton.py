"""The kernels behind `rounding.round_to` and `descent.descend` on CUDA: one pass over the weights.

Measured on an H100: see docs/decisions/stochastic-rounding.md.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from collie_core.ops.rounding import Counters

_BLOCK = 2048
_MOST = 16  # tensors of one launch: the kernel has a branch for each


def serves(*tensors: Tensor) -> bool:
    """Whether the kernels can be used: real, contiguous CUDA tensors, and Triton with a C compiler."""
    return (
        all(
            tensor.is_cuda and tensor.is_contiguous() and type(tensor) in (Tensor, nn.Parameter)
            for tensor in tensors
        )
        and _triton_works()
    )


@cache
def _triton_works() -> bool:
    compilers = (os.environ.get("CC"), "cc", "gcc", "clang")
    return importlib.util.find_spec("triton") is not None and any(
        shutil.which(compiler) for compiler in compilers if compiler
    )


def round_to(target: Tensor, value: Tensor, place: Counters) -> None:
    """bf16 `target` ← fp32 `value`, rounded stochastically."""
    if target.numel():
        _kernels().round_to[_grid(target)](
            target, value, place.starts, target.numel(), place.length, place.origin, place.key, BLOCK=_BLOCK
        )


def descend(
    target: Tensor,
    direction: Tensor,
    finite: Tensor,
    rate: float | Tensor,
    decay: float | Tensor,
    loss_scale: float,
    clip_value: float | None,
    grad_scale: float | Tensor,
    place: Counters,
) -> None:
    """See `collie_core.optimizers.descent.descend`."""
    if target.numel():
        _kernels().descend[_grid(target)](
            target,
            direction,
            finite,
            *number(rate),
            *number(decay),
            *number(grad_scale),
            float(loss_scale),
            clip_value,
            place.starts,
            target.numel(),
            place.length,
            place.origin,
            place.key,
            BLOCK=_BLOCK,
        )


def descend_together(
    targets: Sequence[Tensor],
    directions: Sequence[Tensor],
    finite: Tensor,
    rates: Sequence[float],
    decays: Sequence[float],
    loss_scale: float,
    clip_value: float | None,
    grad_scale: float | Tensor,
    places: Sequence[Counters],
) -> None:
    """See `collie_core.optimizers.descent.descend_together`; each place is a single run.

    One launch for all takes the host half of what one for each takes, 131 against 262 us for nine, which is
    what a step of one short row waits for: in float8 15,100 tok/s of 7B on an H200 instead of 14,770.
    """
    if len(targets) > _MOST:
        for begin in range(0, len(targets), _MOST):
            some = slice(begin, begin + _MOST)
            each = targets[some], directions[some], finite[some], rates[some], decays[some]
            descend_together(*each, loss_scale, clip_value, grad_scale, places[some])
        return
    numels = tuple(target.numel() for target in targets)
    firsts = (0, *accumulate(-(-numel // _BLOCK) for numel in numels))
    _kernels().descend_together[(firsts[-1],)](
        tuple(targets),
        tuple(directions),
        finite,
        tuple(rates),
        tuple(decays),
        *number(grad_scale),
        float(loss_scale),
        clip_value,
        numels,
        firsts,
        tuple(_odd(place.origin) for place in places),
        tuple(_odd(place.key) for place in places),
        BLOCK=_BLOCK,
    )


def _odd(number: int) -> int:
    """`2 number + 1` modulo 2**33, beyond 32 bits for all numbers of 32 bits: Triton makes a kernel anew for
    integers in a tuple that are shorter, or 1, or divisible by 16."""
    return 2 * number + (1 << 34) + 1


def number(value: float | Tensor) -> tuple[float, Tensor | None]:
    """(number, 0-d tensor to read it from instead)."""
    return (0.0, value) if isinstance(value, Tensor) else (float(value), None)


def _grid(target: Tensor) -> tuple[int]:
    return (-(-target.numel() // _BLOCK),)


@cache
def _kernels() -> Any:
    from collie_core.ops import rounding_kernels

    return rounding_kernels
