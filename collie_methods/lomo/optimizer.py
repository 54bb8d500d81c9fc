"""LOMO and AdaLomo as the engine's optimizers: `update` is called for each gradient in the backward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from collie_core.ops.rounding import Noise
from collie_core.optimizers.descent import descend
from collie_core.optimizers.gradients import scaled_gradient
from collie_core.optimizers.state import load_state
from collie_core.run import ParameterGroup
from collie_methods.lomo import rules

if TYPE_CHECKING:
    from collie_core.data.batch import StepBatch
    from collie_core.shard import Shard


class FusedOptimizer:
    """What both share: groups, the settings of a pass, and the rounded write into the parameter.

    groups: learning-rate factor and weight decay of the parameters, by name.
    two_pass: steps of one micro-batch have a pass for the gradient norm of their own.
    clip_grad_value: each element of the true gradient is clamped to ± this.
    seed: of the rounding noise of bf16 parameters.
    """

    in_backward = True

    def __init__(
        self,
        groups: Sequence[ParameterGroup],
        *,
        two_pass: bool = False,
        clip_grad_value: float | None = None,
        seed: int = 0,
    ) -> None:
        self.two_pass, self.clip_grad_value = two_pass, clip_grad_value
        self.seed = seed
        self.group_of = {name: group for group in groups for name in group.parameters}
        self.step_number = 0
        self.lr, self.loss_scale = 0.0, 1.0
        self.grad_scale: float | Tensor = 1.0

    def passes(self, step: StepBatch) -> list[str]:
        """`["norm", "update"]` where a pass for the norm saves keeping the gradients, else `["update"]`.

        The gradients of several micro-batches are kept anyway, until they are complete.
        """
        self.step_number = step.step
        return ["norm", "update"] if self.two_pass and len(step.micro_batches) == 1 else ["update"]

    def begin_pass(self, name: str, lr: float, loss_scale: float, grad_scale: float | Tensor) -> None:
        """Settings of the updates to come."""
        self.lr, self.loss_scale, self.grad_scale = lr, loss_scale, grad_scale

    def end_pass(self, name: str) -> None:
        """Nothing is left to do: every update was complete."""

    def step(self, lr: float) -> None:
        """Never called: the updates are in the backward pass."""
        raise NotImplementedError(f"{type(self).__name__} updates in the backward pass, not in step()")

    def state_dict(self) -> dict[str, Any]:
        """No state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of state_dict.  Raises CheckpointError where the state does not fit."""
        load_state(self.state_dict(), state)

    def _noise(self, shard: Shard) -> Noise:
        return Noise.of(self.seed, self.step_number, shard)


class LomoOptimizer(FusedOptimizer):
    """LOMO (Lv et al. 2023, arXiv 2306.09782); it has no state."""

    @torch.no_grad()
    def update(self, name: str, parameter: nn.Parameter, gradient: Tensor, finite: Tensor) -> None:
        """One parameter's step; see `collie_core.hookspecs.Optimizer`."""
        group = self.group_of[name]
        lr = self.lr * group.lr_scale
        descend(
            parameter.detach(),
            gradient,
            self._noise(group.shard(name)),
            finite=finite,
            rate=lr,
            decay=lr * group.weight_decay,
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
        gradient = scaled_gradient(gradient, self.loss_scale, self.grad_scale, self.clip_grad_value)
        rule = rules.matrix_update if weight.ndim >= 2 else rules.vector_update
        update = rule(gradient, **state, finite=finite, shard=shard)
        rate, decay = rules.rates(weight, update, self.lr * group.lr_scale, group.weight_decay, shard)
        descend(weight, update, self._noise(shard), finite=finite, rate=rate, decay=decay)

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
