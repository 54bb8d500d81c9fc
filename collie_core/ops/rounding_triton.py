"""The kernels behind `rounding.round_to` and `descent.descend` on CUDA: one pass over the weights.

Measured on an H100: see docs/decisions/stochastic-rounding.md.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collie_core.ops.rounding import Counters

_BLOCK = 2048


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
            STOCHASTIC=target.dtype == torch.bfloat16,
            BLOCK=_BLOCK,
        )


def number(value: float | Tensor) -> tuple[float, Tensor | None]:
    """(number, 0-d tensor to read it from instead)."""
    return (0.0, value) if isinstance(value, Tensor) else (float(value), None)


def _grid(target: Tensor) -> tuple[int]:
    return (-(-target.numel() // _BLOCK),)


@cache
def _kernels() -> Any:
    from collie_core.ops import rounding_kernels

    return rounding_kernels
