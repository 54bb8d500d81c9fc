"""Signum, sign descent with momentum (Bernstein et al. 2018, arXiv 1802.04434), in the backward pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from collie_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from torch import Tensor, nn

    from collie_core.data.batch import StepBatch
    from collie_core.hookspecs import Layout
    from collie_core.run import Run


class SignumPlugin:
    """Sign descent with momentum; each gradient is used in the backward pass and freed."""

    collie_api = 1
    in_backward = True
    default_lr = 1e-3

    @dataclass(frozen=True)
    class Options:
        """Keys of `optimizer:` beside the core's."""

        momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9

    def __init__(self, options: Options) -> None:
        self.options = options

    @hookimpl
    def collie_check(self, run: Run) -> list[str]:
        """A sign has no size that could be clipped."""
        if run.config.optimizer.clip_grad_norm is not None:
            return ["optimizer.clip_grad_norm changes no sign; leave it out"]
        return []

    @hookimpl
    def collie_optimizer(self, model: nn.Module, layout: Layout, run: Run) -> Signum:
        """The optimizer over the final parameters of `model`."""
        return Signum(model, run, self.options.momentum)


class Signum:
    """m ← β m + (1 - β) g; p ← p - lr (sign(m) + wd p).  See `collie_core.hookspecs.Optimizer`."""

    in_backward = True

    def __init__(self, model: nn.Module, run: Run, momentum: float) -> None:
        import torch

        self.beta, self.seed, self.clip_value = momentum, run.seed, run.config.optimizer.clip_grad_value
        self.group_of = {
            name: group
            for group in run.parameter_groups(model, default_lr=SignumPlugin.default_lr)
            for name in group.parameters
        }
        self.momentum = {
            name: torch.zeros_like(parameter, dtype=torch.float32)
            for group in self.group_of.values()
            for name, parameter in group.parameters.items()
        }
        self.step_number, self.lr, self.loss_scale = 0, 0.0, 1.0
        self.grad_scale: Any = 1.0

    def passes(self, step: StepBatch) -> list[str]:
        """One pass: nothing must be known of the gradients before."""
        self.step_number = step.step
        return ["update"]

    def begin_pass(self, name: str, lr: float, loss_scale: float, grad_scale: Any) -> None:
        """Settings of the updates to come."""
        self.lr, self.loss_scale, self.grad_scale = lr, loss_scale, grad_scale

    def end_pass(self, name: str) -> None:
        """Every update is complete."""

    def update(self, name: str, parameter: nn.Parameter, gradient: Tensor, finite: Tensor) -> None:
        """One parameter's step; where `finite` is false nothing changes, and the host is never asked."""
        import torch

        from collie_core.plugin import round_to, scaled_gradient

        group, old, weight = self.group_of[name], self.momentum[name], parameter.detach()
        gradient = scaled_gradient(gradient, self.loss_scale, self.grad_scale, self.clip_value)
        momentum = torch.where(finite, old.lerp(gradient, 1 - self.beta), old)
        direction = momentum.sign() + group.weight_decay * weight.float()
        value = torch.where(finite, weight.float() - self.lr * group.lr_scale * direction, weight.float())
        round_to(weight, value, seed=self.seed, step=self.step_number, name=name)
        old.copy_(momentum)

    def state_dict(self) -> dict[str, Tensor]:
        """The live momenta."""
        return {f"{name}.momentum": tensor for name, tensor in self.momentum.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of state_dict."""
        for name, tensor in self.momentum.items():
            tensor.copy_(state[f"{name}.momentum"])
