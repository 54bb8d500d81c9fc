"""The sum of squares of a gradient on CUDA, and whether it is finite: one reading, two kernels.

torch takes a kernel for each of norm, square, isfinite and `and`, the first at about half of the memory's
rate.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from collie_core.ops import rounding_triton

_BLOCK = 8192


def serves(tensor: Tensor) -> bool:
    """Whether the kernels can be used."""
    return tensor.numel() > 0 and rounding_triton.serves(tensor)


def squares(tensor: Tensor, finite: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """(sum of squares, 0-d fp32; whether it and `finite`, 0-d bool, are: 0-d bool, None where that is None).

    The order of the additions depends on the number of elements alone.
    """
    blocks = -(-tensor.numel() // _BLOCK)
    found = torch.empty(blocks, dtype=torch.float32, device=tensor.device)
    square = torch.empty((), dtype=torch.float32, device=tensor.device)
    flag = None if finite is None else torch.empty_like(finite)
    _kernels().partial_squares[(blocks,)](tensor, found, tensor.numel(), BLOCK=_BLOCK, num_warps=8)
    wide = 1 << (blocks - 1).bit_length()
    _kernels().total_squares[(1,)](found, square, finite, flag, blocks, BLOCKS=wide, num_warps=8)
    return square, flag


@cache
def _kernels() -> Any:
    from collie_core.ops import norm_kernels

    return norm_kernels
