"""Cross entropy over a vocabulary that is cut among tensor-parallel ranks, evenly or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from collie_core.layouts.collectives import GatherVocabulary
from collie_core.ops.cross_entropy import IGNORED

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Vocabulary:
    """This rank's words: logits of words `start`, `start + 1`, ... of `size` in all.

    width: the most words of a rank, so that all ranks cut the loss into the same pieces.
    """

    group: ProcessGroup
    start: int
    size: int
    width: int

    def summed_nll(self, logits: Tensor, targets: Tensor) -> Tensor:
        """As `collie_core.ops.cross_entropy.summed_nll` of the whole vocabulary."""
        loss: Tensor = _SummedNll.apply(logits, targets, self)
        return loss

    def whole(self, logits: Tensor) -> Tensor:
        """(..., this rank's words) -> (..., V) on every rank."""
        gathered: Tensor = GatherVocabulary.apply(logits, self.group, self.start, self.size)
        return gathered


class _SummedNll(torch.autograd.Function):
    """log(sum(exp)) over all ranks less the target's logit; the gradient is softmax less one-hot."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, words: Vocabulary) -> Tensor:
        x = logits.float()
        wanted = targets != IGNORED
        place = targets - words.start
        here = wanted & (place >= 0) & (place < x.shape[-1])
        place = place.masked_fill(~here, 0).unsqueeze(-1)
        highest = x.amax(-1) if x.shape[-1] else x.new_full(x.shape[:-1], -torch.inf)
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=words.group)
        exponentials = (x - highest.unsqueeze(-1)).exp_()
        own = x.gather(-1, place).squeeze(-1) if x.shape[-1] else torch.zeros_like(highest)
        sums = torch.stack([exponentials.sum(-1), own.masked_fill(~here, 0.0)])
        dist.all_reduce(sums, group=words.group)
        total, of_target = sums
        ctx.save_for_backward(exponentials.div_(total.unsqueeze(-1)), place, here, wanted)
        ctx.dtype = logits.dtype
        return (total.log() + highest - of_target).masked_fill(~wanted, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        probabilities, place, here, wanted = ctx.saved_tensors
        result = probabilities.clone()
        if result.shape[-1]:
            result.scatter_add_(-1, place, here.unsqueeze(-1).to(result.dtype).neg_())
        result.mul_((wanted * gradient).unsqueeze(-1))
        return result.to(ctx.dtype), None, None
