"""The negative log likelihood of logits on CUDA: no fp32 copy of the logits, and one pass each way.

torch's own log_softmax and nll_loss write and read the logits in fp32 several times: about eight times as
many bytes for bf16 logits.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from collie_core.ops import rounding_triton

_BLOCK = 4096


def serves(logits: Tensor, targets: Tensor) -> bool:
    """Whether the kernels can be used."""
    return logits.ndim == 2 and logits.numel() > 0 and rounding_triton.serves(logits, targets)


def summed_nll(logits: Tensor, targets: Tensor, ignored: int) -> Tensor:
    """logits (N, V), any dtype, and targets int64 (N,) -> the sum over targets that are not `ignored`: 0-d
    fp32, computed in fp32."""
    found: Tensor = _Nll.apply(logits, targets, ignored)
    return found


class _Nll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ignored: int) -> Tensor:
        rows, words = logits.shape
        found, log_sums = torch.empty((2, rows), dtype=torch.float32, device=logits.device)
        _kernels().losses[(rows,)](logits, targets, found, log_sums, ignored, words=words, BLOCK=_BLOCK)
        ctx.save_for_backward(logits, targets, log_sums)
        ctx.ignored = ignored
        return found.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, log_sums = ctx.saved_tensors
        rows, words = logits.shape
        made = torch.empty_like(logits)
        grid = (rows, -(-words // _BLOCK))
        _kernels().gradients[grid](
            logits, targets, log_sums, scale, made, ctx.ignored, words=words, BLOCK=_BLOCK
        )
        return made, None, None


@cache
def _kernels() -> Any:
    from collie_core.ops import cross_entropy_kernels

    return cross_entropy_kernels
