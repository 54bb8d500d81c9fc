"""LOMO and AdaLomo as the engine's optimizers: `update` is called for each gradient in the backward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

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

    def state_dict(self) -> dict[str, Tensor]:
        """No state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of state_dict.  Raises CheckpointError where the state does not fit."""
        load_state(self.state_dict(), state)

    def _noise(self, name: str) -> Noise:
        return Noise(self.seed, self.step_number, name)


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
            self._noise(name),
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
        self.state = {
            name: _new_state(parameter) for group in groups for name, parameter in group.parameters.items()
        }

    @torch.no_grad()
    def update(self, name: str, parameter: nn.Parameter, gradient: Tensor, finite: Tensor) -> None:
        """One parameter's step; see `collie_core.hookspecs.Optimizer`."""
        if parameter.numel() == 0:
            return
        group, state, weight = self.group_of[name], self.state[name], parameter.detach()
        gradient = scaled_gradient(gradient, self.loss_scale, self.grad_scale, self.clip_grad_value)
        rule = rules.matrix_update if weight.ndim >= 2 else rules.vector_update
        update = rule(gradient, **state, finite=finite)
        rate, decay = rules.rates(weight, update, self.lr * group.lr_scale, group.weight_decay)
        descend(weight, update, self._noise(name), finite=finite, rate=rate, decay=decay)

    def state_dict(self) -> dict[str, Tensor]:
        """`<name>.<state>`: the live tensors."""
        return {f"{name}.{key}": value for name, state in self.state.items() for key, value in state.items()}


def _new_state(parameter: nn.Parameter) -> dict[str, Tensor]:
    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=parameter.device)

    if parameter.ndim < 2:
        return {"v": zeros(*parameter.shape), "t": zeros()}
    *batch, rows, columns = parameter.shape
    return {"row": zeros(*batch, rows), "col": zeros(*batch, columns), "t": zeros()}
