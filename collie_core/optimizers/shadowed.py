"""A torch optimizer over parameters of any dtype, computing in fp32 and keeping no fp32 copy of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from collie_core.errors import CheckpointError, nearest
from collie_core.ops.rounding import round_to
from collie_core.run import ParameterGroup
from collie_core.shard import Shard

if TYPE_CHECKING:
    from collie_core.data.batch import StepBatch
    from collie_core.run import Run


@dataclass(frozen=True)
class _Part:
    """One torch optimizer, the names of its parameters in its order, and what its only one stands for:
    a shadow in fp32 (empty between steps) of the part of a parameter of lower precision, or None."""

    optimizer: torch.optim.Optimizer
    names: list[str]
    shadowed: Shard | None

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


class ShadowedOptimizer:
    """`torch_class(options)` over the groups of a run.

    fp32 parameters share one torch optimizer.  Each bf16 or fp16 parameter has its own, over an fp32 shadow
    that holds values only while this parameter is updated; states are fp32.  The noise of bf16 rounding is
    that of step `run.step + 1`.

    torch_class, groups and options are the recipe, for a layout that updates flat parts of parameters itself.
    """

    in_backward = False

    def __init__(
        self,
        torch_class: type[torch.optim.Optimizer],
        groups: Sequence[ParameterGroup],
        options: Mapping[str, Any],
        run: Run,
    ) -> None:
        self.run, self.torch_class, self.groups, self.options = run, torch_class, groups, options
        self.parts: list[_Part] = []
        plain_groups: list[dict[str, Any]] = []
        plain_names: list[str] = []
        for group in groups:
            settings = {"lr_scale": group.lr_scale, "weight_decay": group.weight_decay}
            plain = {name: p for name, p in group.parameters.items() if p.dtype == torch.float32}
            if plain:
                plain_groups.append({"params": list(plain.values()), **settings})
                plain_names += plain
            for name, parameter in group.parameters.items():
                if name not in plain:
                    shadow = nn.Parameter(parameter.detach().float())
                    optimizer = torch_class([{"params": [shadow], **settings}], **options)
                    _empty(shadow)
                    self.parts.append(_Part(optimizer, [name], group.shard(name)))
        if plain_groups:
            self.parts.append(_Part(torch_class(plain_groups, **options), plain_names, None))

    def passes(self, step: StepBatch) -> list[str]:
        """One pass."""
        return ["update"]

    def begin_pass(self, name: str, lr: float, loss_scale: float, grad_scale: float | Tensor) -> None:
        """Nothing happens before `step`."""

    def end_pass(self, name: str) -> None:
        """Nothing happens before `step`."""

    def update(self, name: str, parameter: nn.Parameter, gradient: Tensor, finite: Tensor) -> None:
        """Never called: the update is `step`."""
        raise NotImplementedError(f"{type(self).__name__} updates in step(), after the backward pass")

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every parameter that has a gradient; the rate is lr times the group's factor."""
        for part in self.parts:
            for group in part.optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            if part.shadowed is None:
                part.optimizer.step()
            elif part.shadowed.local.grad is not None:
                self._step_shadowed(part, part.shadowed)

    def _step_shadowed(self, part: _Part, shard: Shard) -> None:
        [shadow], parameter = part.parameters, shard.local
        assert parameter.grad is not None
        shadow.data = parameter.detach().float()
        shadow.grad = parameter.grad.float()
        part.optimizer.step()
        round_to(
            parameter.detach(),
            shadow.detach(),
            seed=self.run.seed,
            step=self.run.step + 1,
            name=shard.name,
            offset=shard.offsets,
            global_shape=shard.shape,
        )
        _empty(shadow)

    def state_dict(self) -> dict[str, Tensor]:
        """`<parameter>.<state>`: torch's own state tensors, step counts included."""
        return {
            f"{name}.{key}": value
            for part in self.parts
            for name, parameter in zip(part.names, part.parameters, strict=True)
            for key, value in part.optimizer.state[parameter].items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of state_dict; copies.  Raises CheckpointError for a state of an unknown parameter."""
        by_parameter: dict[str, dict[str, Tensor]] = {name: {} for part in self.parts for name in part.names}
        for full_name, value in state.items():
            name, _, key = full_name.rpartition(".")
            if name not in by_parameter:
                hint = nearest(name, by_parameter)
                raise CheckpointError(
                    f"optimizer state {full_name}: {name!r} is no parameter that is trained{hint}"
                )
            by_parameter[name][key] = value.clone()
        for part in self.parts:
            saved = part.optimizer.state_dict()
            saved["state"] = {
                index: by_parameter[name] for index, name in enumerate(part.names) if by_parameter[name]
            }
            part.optimizer.load_state_dict(saved)


def _empty(shadow: nn.Parameter) -> None:
    shadow.grad = None
    shadow.data = torch.empty(0, device=shadow.device)
