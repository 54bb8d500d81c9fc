"""LOMO and AdaLomo as the engine's optimizers: `update` is called for each gradient in the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from collie_core.optimizers.descent import descend, descend_together
from collie_core.optimizers.fused import FusedOptimizer
from collie_core.optimizers.gradients import scaled_gradient, sum_of_squares
from collie_core.run import ParameterGroup
from collie_methods.lomo import adalomo_triton, rules

if TYPE_CHECKING:
    from collie_core.shard import Shard


class LomoOptimizer(FusedOptimizer):
    """LOMO (Lv et al. 2023, arXiv 2306.09782); it has no state."""

    def update(self, name: str, parameter: nn.Parameter, gradient: Tensor, finite: Tensor) -> None:
        """One parameter's step; see `collie_core.hookspecs.Optimizer`."""
        self.update_together([(name, parameter, gradient)], finite.unsqueeze(0))

    def update_together(
        self, gradients: Sequence[tuple[str, nn.Parameter, Tensor]], finite: Tensor
    ) -> None:
        """The steps of several; see `collie_core.hookspecs.Optimizer`."""
        groups = [self.group_of[name] for name, _, _ in gradients]
        rates = [self.lr * group.lr_scale for group in groups]
        descend_together(
            [parameter.detach() for _, parameter, _ in gradients],
            [gradient for _, _, gradient in gradients],
            [self.noise(group.shard(name)) for group, (name, _, _) in zip(groups, gradients, strict=True)],
            finite=finite,
            rates=rates,
            decays=[lr * group.weight_decay for lr, group in zip(rates, groups, strict=True)],
            loss_scale=self.loss_scale,
            clip_value=self.clip_grad_value,
            grad_scale=self.grad_scale,
        )


class AdaLomoOptimizer(FusedOptimizer):
    """AdaLomo (Lv et al. 2023, arXiv 2310.10195).

    State in fp32: `<name>.row` and `<name>.col` for matrices, `<name>.v` for vectors and numbers, and
    `<name>.t`, the number of updates of this parameter: a step that is skipped does not count.
    """

    def __init__(
        self,
        groups: Sequence[ParameterGroup],
        *,
        two_pass: bool = False,
        clip_grad_value: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(groups, two_pass=two_pass, clip_grad_value=clip_grad_value, seed=seed)
        self.shards = {name: group.shard(name) for group in groups for name in group.parameters}
        self.state = {name: _new_state(shard) for name, shard in self.shards.items()}

    @torch.no_grad()
    def update(self, name: str, parameter: nn.Parameter, gradient: Tensor, finite: Tensor) -> None:
        """One parameter's step; see `collie_core.hookspecs.Optimizer`."""
        shard = self.shards[name]
        if 0 in shard.shape:
            return
        group, state, weight = self.group_of[name], self.state[name], parameter.detach()
        lr, wd, noise = self.lr * group.lr_scale, group.weight_decay, self.noise(shard)
        scaling = (self.loss_scale, self.clip_grad_value, self.grad_scale)
        if adalomo_triton.serves(weight, gradient, finite):
            matrix = adalomo_triton.Matrix(weight, gradient, *scaling)
            factors = rules.matrix_factors(*matrix.moments(), **state, finite=finite, shard=shard)
            rate, decay = rules.rates(*matrix.squares(*factors), lr, wd, shard)
            matrix.descend(*factors, noise, finite=finite, rate=rate, decay=decay)
            return
        gradient = scaled_gradient(gradient, self.loss_scale, self.grad_scale, self.clip_grad_value)
        rule = rules.matrix_update if weight.ndim >= 2 else rules.vector_update
        update = rule(gradient, **state, finite=finite, shard=shard)
        squares = sum_of_squares(weight), sum_of_squares(update)
        rate, decay = rules.rates(*squares, lr, wd, shard)
        descend(weight, update, noise, finite=finite, rate=rate, decay=decay)

    def state_dict(self) -> dict[str, Any]:
        """`<name>.<state>`: the live tensors, or this rank's pieces of them."""
        return {
            f"{name}.{key}": self.shards[name].piece(value, _dimensions(key, value))
            for name, state in self.state.items()
            for key, value in state.items()
        }


def _new_state(shard: Shard) -> dict[str, Tensor]:
    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=shard.local.device)

    if len(shard.shape) < 2:
        return {"v": zeros(*shard.local.shape), "t": zeros()}
    *batch, rows, columns = shard.local.shape
    return {"row": zeros(*batch, rows), "col": zeros(*batch, columns), "t": zeros()}


def _dimensions(key: str, value: Tensor) -> list[int]:
    """Which dimensions of its parameter a state has."""
    dims = list(range(value.ndim))
    return dims if key != "col" else [*dims[:-1], value.ndim]
