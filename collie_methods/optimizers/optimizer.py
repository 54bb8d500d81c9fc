"""The optimizer for a rule that works on each element by itself, in the backward pass or after it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from collie_core.optimizers.descent import descend
from collie_core.optimizers.fused import FusedOptimizer
from collie_core.optimizers.gradients import scaled_gradient
from collie_core.run import ParameterGroup
from collie_core.shard import Shard
from collie_methods.optimizers.rules import Rule, States
from collie_methods.optimizers.stores import Store

#: (shard, key, whether it may be negative) -> where a state is kept
MakeStore = Callable[[Shard, str, bool], Store]


class RuledOptimizer(FusedOptimizer):
    """`rule` on every parameter.

    States are `<name>.<key>`, kept as `store` says, and `<name>.t`, the number of updates of this parameter
    (fp32): a step that is skipped does not count.  options: FusedOptimizer's.
    """

    def __init__(
        self,
        groups: Sequence[ParameterGroup],
        rule: Rule,
        store: MakeStore,
        *,
        in_backward: bool = False,
        two_pass: bool = False,
        clip_grad_value: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            groups,
            in_backward=in_backward,
            two_pass=two_pass,
            clip_grad_value=clip_grad_value,
            seed=seed,
        )
        self.rule = rule
        self.shards = {name: group.shard(name) for group in groups for name in group.parameters}
        self.stores = {
            name: {key: store(shard, key, key not in rule.unsigned) for key in rule.keys}
            for name, shard in self.shards.items()
        }
        self.counts = {name: torch.zeros((), device=s.local.device) for name, s in self.shards.items()}

    @cached_property
    def skips_on_device(self) -> bool:
        """See `collie_core.hookspecs.Optimizer`: on a device nothing asks the host."""
        return all(shard.local.device.type != "cpu" for shard in self.shards.values())

    @torch.no_grad()
    def update(self, name: str, parameter: nn.Parameter, gradient: Tensor, finite: Tensor) -> None:
        """One parameter's step; see `collie_core.hookspecs.Optimizer`."""
        gradient = scaled_gradient(gradient, self.loss_scale, self.grad_scale, self.clip_grad_value)
        self._update(name, gradient, finite)

    def update_all(self, gradients: Iterable[tuple[str, nn.Parameter, Tensor]], finite: Tensor) -> None:
        """Every parameter's step; see `collie_core.hookspecs.Optimizer`."""
        for name, parameter, gradient in gradients:
            self.update(name, parameter, gradient, finite)
            parameter.grad = None

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Every parameter's step; see `collie_core.hookspecs.Optimizer`."""
        self.lr = lr
        for name, shard in self.shards.items():
            if shard.local.grad is not None:
                finite = torch.ones((), dtype=torch.bool, device=shard.local.device)
                self._update(name, shard.local.grad.float(), finite)

    def _update(self, name: str, gradient: Tensor, finite: Tensor) -> None:
        """gradient: fp32, the true one."""
        shard, group = self.shards[name], self.group_of[name]
        self.counts[name].add_(finite)
        states = {key: store.read() for key, store in self.stores[name].items()}
        direction, changed = self.rule.direction(gradient, states, self.counts[name].clamp(min=1.0))
        rate, decay = self.rule.rates(self.lr * group.lr_scale, group.weight_decay)
        weight = shard.local.detach()
        descend(weight, direction, self.noise(shard), finite=finite, rate=rate, decay=decay)
        self._write(name, changed, finite)

    def _write(self, name: str, states: States, finite: Tensor) -> None:
        for key, value in states.items():
            self.stores[name][key].write(value, finite, self.seed, self.step_number)

    def state_dict(self) -> dict[str, Any]:
        """The live tensors, or this rank's pieces of them."""
        found: dict[str, Any] = {f"{name}.t": count for name, count in self.counts.items()}
        for name, stores in self.stores.items():
            for key, store in stores.items():
                found |= {f"{name}.{key}{suffix}": tensor for suffix, tensor in store.tensors().items()}
        return found
