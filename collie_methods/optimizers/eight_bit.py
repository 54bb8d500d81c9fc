"""AdamW with 8-bit states."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from collie_methods.optimizers import eight_bit_triton
from collie_methods.optimizers.optimizer import RuledOptimizer
from collie_methods.optimizers.rules import AdamW
from collie_methods.optimizers.stores import EightBit


class AdamW8bit(RuledOptimizer):
    """`AdamW` over `EightBit` stores: matrices by one kernel, where it serves."""

    rule: AdamW

    @torch.no_grad()
    def update(self, name: str, parameter: nn.Parameter, gradient: Tensor, finite: Tensor) -> None:
        """One parameter's step; see `collie_core.hookspecs.Optimizer`."""
        shard, group = self.shards[name], self.group_of[name]
        average, square = (self.stores[name][key] for key in self.rule.keys)
        weight = shard.local.detach()
        if not (
            isinstance(average, EightBit)
            and isinstance(square, EightBit)
            and eight_bit_triton.serves(weight, gradient, finite)
        ):
            return super().update(name, parameter, gradient, finite)
        self.counts[name].add_(finite)
        eight_bit_triton.step(
            weight,
            gradient,
            average,
            square,
            self.counts[name],
            self.rule,
            self.rule.rates(self.lr * group.lr_scale, group.weight_decay),
            self.noise(shard),
            finite=finite,
            loss_scale=self.loss_scale,
            clip_value=self.clip_grad_value,
            grad_scale=self.grad_scale,
        )
