"""What optimizers share that update inside the backward pass, always or when asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from collie_core.ops.rounding import Noise
from collie_core.optimizers.state import load_state
from collie_core.run import ParameterGroup

if TYPE_CHECKING:
    from collie_core.data.batch import StepBatch
    from collie_core.shard import Shard


class FusedOptimizer:
    """Groups, the passes of a step, and the settings of the pass that runs.

    groups: learning-rate factor and weight decay of the parameters, by name.
    in_backward: false for one that was not asked to update in the backward pass.
    two_pass: steps of one micro-batch have a pass for the gradient norm of their own.
    clip_grad_value: each element of the true gradient is clamped to ± this.
    seed: of the rounding noise of bf16 parameters.
    """

    def __init__(
        self,
        groups: Sequence[ParameterGroup],
        *,
        in_backward: bool = True,
        two_pass: bool = False,
        clip_grad_value: float | None = None,
        seed: int = 0,
    ) -> None:
        self.groups, self.in_backward, self.two_pass = groups, in_backward, two_pass
        self.clip_grad_value, self.seed = clip_grad_value, seed
        self.group_of = {name: group for group in groups for name in group.parameters}
        self.step_number = 0
        self.lr, self.loss_scale = 0.0, 1.0
        self.grad_scale: float | Tensor = 1.0

    def passes(self, step: StepBatch) -> list[str]:
        """`["norm", "update"]` where a pass for the norm saves keeping the gradients, else `["update"]`.

        The gradients of several micro-batches are kept anyway, until they are complete.
        """
        self.step_number = step.step
        two = self.in_backward and self.two_pass and len(step.micro_batches) == 1
        return ["norm", "update"] if two else ["update"]

    def begin_pass(self, name: str, lr: float, loss_scale: float, grad_scale: float | Tensor) -> None:
        """Settings of the updates to come."""
        self.lr, self.loss_scale, self.grad_scale = lr, loss_scale, grad_scale

    def end_pass(self, name: str) -> None:
        """Nothing is left to do: every update was complete."""

    def update(self, name: str, parameter: nn.Parameter, gradient: Tensor, finite: Tensor) -> None:
        """One parameter's step; see `collie_core.hookspecs.Optimizer`."""
        raise NotImplementedError(f"{type(self).__name__} updates in step(), after the backward pass")

    def step(self, lr: float) -> None:
        """Every parameter's step; see `collie_core.hookspecs.Optimizer`."""
        raise NotImplementedError(f"{type(self).__name__} updates in the backward pass, not in step()")

    def state_dict(self) -> dict[str, Any]:
        """No state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of state_dict.  Raises CheckpointError where the state does not fit."""
        load_state(self.state_dict(), state)

    def noise(self, shard: Shard) -> Noise:
        """Of the rounding of this step's update."""
        return Noise.of(self.seed, self.step_number, shard)
