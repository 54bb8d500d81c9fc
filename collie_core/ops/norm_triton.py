"""The sums of squares of gradients on CUDA, and whether they are finite: one reading, two kernels for all.

The tensors of a block are measured at once: a kernel for each would take the host ten times as long (405
against 42 us for nine on an H100), which is what a step of one short row waits for.  torch's own
`_foreach_norm` reads at 0.6 of the memory's rate, these kernels at 0.9.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from collie_core.ops import rounding_triton

_BLOCK = 8192
_MOST = 16  # tensors of one launch: the kernels have a branch for each


def serves(tensors: Sequence[Tensor]) -> bool:
    """Whether the kernels can be used."""
    return rounding_triton.serves(*tensors) and all(tensor.numel() > 0 for tensor in tensors)


def squares(tensors: Sequence[Tensor], finite: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """(sum of squares of each, fp32 (n,); whether it and `finite`, 0-d bool, are: bool (n,), None where that
    is None).

    The order of the additions depends on the numbers of elements alone.
    """
    if len(tensors) > _MOST:
        parts = [squares(tensors[i : i + _MOST], finite) for i in range(0, len(tensors), _MOST)]
        flags = None if finite is None else torch.cat([flag for _, flag in parts if flag is not None])
        return torch.cat([square for square, _ in parts]), flags
    numels = tuple(tensor.numel() for tensor in tensors)
    blocks = [-(-numel // _BLOCK) for numel in numels]
    firsts = (0, *accumulate(blocks))
    device = tensors[0].device
    found = torch.empty(firsts[-1], dtype=torch.float32, device=device)
    sums = torch.empty(len(tensors), dtype=torch.float32, device=device)
    flags = None if finite is None else torch.empty(len(tensors), dtype=torch.bool, device=device)
    _kernels().partial_squares[(firsts[-1],)](
        tuple(tensors), numels, firsts, found, BLOCK=_BLOCK, num_warps=8
    )
    wide = 1 << (max(blocks) - 1).bit_length()
    _kernels().total_squares[(len(tensors),)](
        found, firsts, sums, finite, flags, BLOCKS=wide, num_warps=8
    )
    return sums, flags


@cache
def _kernels() -> Any:
    from collie_core.ops import norm_kernels

    return norm_kernels
