"""Collectives between the layers of tensor-parallel ranks, each with the one that its backward pass is.

`Copy` and `Reduce` bound what is computed on cut weights (f and g of Shoeybi et al. 2019, arXiv 1909.08053,
section 3), or `GatherSequence` and `ReduceScatterSequence` with sequence parallelism (Korthikanti et al.
2022, arXiv 2205.05198, section 4.2.2), which cuts the activations outside along the sequence, dimension 1.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed._functional_collectives as functional
from torch import Tensor
from torch.distributed import ProcessGroup

# torch 2.13 renamed them
_all_gather = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor
_reduce_scatter = getattr(functional, "reduce_scatter_single", None) or functional.reduce_scatter_tensor


def all_reduce(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """The sum over `group`; a function of its own so that compiled blocks hold it in their graph."""
    return functional.wait_tensor(functional.all_reduce(tensor.contiguous(), "sum", group))


def gather_sequence(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """(B, S / n, ...) of each rank -> (B, S, ...)."""
    if tensor.device.type != "cpu":
        return functional.wait_tensor(_all_gather(tensor.contiguous(), 1, group))
    # gloo's own gather corrupts memory: its threads write the name of the last operation unlocked, and this
    # name is long enough for the heap (torch 2.13, ProcessGroupGloo::runLoop)
    copies = tensor.repeat(group.size(), *[1] * (tensor.ndim - 1))
    parts = functional.wait_tensor(functional.all_to_all_single(copies, None, None, group))
    return torch.cat(parts.chunk(group.size()), 1)


def reduce_scatter_sequence(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """(B, S, ...) -> this rank's (B, S / n, ...) of the sum."""
    return functional.wait_tensor(_reduce_scatter(tensor.contiguous(), "sum", 1, group))


def own_part(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """(B, S, ...) -> this rank's (B, S / n, ...)."""
    return tensor.chunk(group.size(), 1)[group.rank()].contiguous()


class Copy(torch.autograd.Function):
    """As it is; the gradients of the ranks are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return all_reduce(gradient, ctx.group), None


class Reduce(torch.autograd.Function):
    """The sum over the ranks; the gradient as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class GatherSequence(torch.autograd.Function):
    """The whole sequence; the gradients of the ranks are summed, each rank keeping its part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return gather_sequence(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter_sequence(gradient, ctx.group), None


class ReduceScatterSequence(torch.autograd.Function):
    """This rank's part of the sum over the ranks; the gradient of the whole sequence."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return reduce_scatter_sequence(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gather_sequence(gradient, ctx.group), None


class SplitSequence(torch.autograd.Function):
    """This rank's part of what all ranks have whole; the gradient of the whole sequence."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return own_part(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gather_sequence(gradient, ctx.group), None


class JoinSequence(torch.autograd.Function):
    """The whole sequence for what every rank computes alike; this rank's part of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return gather_sequence(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return own_part(gradient, ctx.group), None


class GatherVocabulary(torch.autograd.Function):
    """(..., this rank's words) -> (..., V), for what every rank computes alike; words may be cut unevenly."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, start: int, size: int) -> Tensor:
        ctx.place = slice(start, start + x.shape[-1])
        whole = x.new_zeros(*x.shape[:-1], size)
        whole[..., ctx.place] = x
        return all_reduce(whole, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return gradient[..., ctx.place].contiguous(), None, None, None
