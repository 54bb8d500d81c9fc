"""A torch optimizer over parameters of any dtype, computing in fp32 and keeping no fp32 copy of the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from collie_core.errors import CheckpointError, nearest
from collie_core.ops.rounding import Noise, round_to
from collie_core.optimizers import adam_triton
from collie_core.optimizers.fused import FusedOptimizer
from collie_core.optimizers.gradients import scaled_gradient
from collie_core.run import ParameterGroup
from collie_core.shard import Shard

if TYPE_CHECKING:
    from collie_core.run import Run


@dataclass(frozen=True)
class _Part:
    """One torch optimizer and the names of its parameters in its order.

    alone: the part of the only parameter that it updates, or None where fp32 parameters share it.  One of
    lower precision is updated on a shadow in fp32, which is empty between steps.
    narrow: its states of lower precision between steps, by their keys.
    """

    optimizer: torch.optim.Optimizer
    names: list[str]
    alone: Shard | None = None
    narrow: dict[str, Tensor] = field(default_factory=dict)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    @property
    def settings(self) -> dict[str, Any]:
        """The only group of one that is alone."""
        group: dict[str, Any] = self.optimizer.param_groups[0]
        return group


class ShadowedOptimizer(FusedOptimizer):
    """`torch_class(options)` over the groups of a run.

    fp32 parameters share one torch optimizer, where nothing speaks against it.  Each bf16 or fp16 parameter
    has its own, over an fp32 shadow that holds values only while this parameter is updated.  So has every
    parameter where states are not fp32, or updates are in the backward pass.  The noise of bf16 rounding is
    that of step `run.step + 1`.

    torch_class, groups and options are the recipe, for a layout that updates flat parts of parameters itself.
    in_backward: `update` is called instead of `step`; on CUDA options then say `fused`, since torch's fused
    kernels alone can leave a parameter as it was without asking the host.
    two_pass, clip_grad_value: as FusedOptimizer's.
    zero_states: states that are zero before the first step and that torch makes of the first gradient alone.
    state_dtype: of the states of a parameter's elements.
    """

    def __init__(
        self,
        torch_class: type[torch.optim.Optimizer],
        groups: Sequence[ParameterGroup],
        options: Mapping[str, Any],
        run: Run,
        *,
        in_backward: bool = False,
        two_pass: bool = False,
        clip_grad_value: float | None = None,
        zero_states: Sequence[str] = (),
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(
            groups,
            in_backward=in_backward,
            two_pass=two_pass,
            clip_grad_value=clip_grad_value,
            seed=run.seed,
        )
        self.run, self.torch_class, self.options, self.state_dtype = run, torch_class, options, state_dtype
        self.parts: list[_Part] = []
        shared: list[dict[str, Any]] = []
        names: list[str] = []
        together = not in_backward and state_dtype == torch.float32
        for group in groups:
            settings = {"lr_scale": group.lr_scale, "weight_decay": group.weight_decay}
            plain = {n: p for n, p in group.parameters.items() if together and p.dtype == torch.float32}
            if plain:
                shared.append({"params": list(plain.values()), **settings})
                names += plain
            for name, parameter in group.parameters.items():
                if name not in plain:
                    own = parameter if parameter.dtype == torch.float32 else _shadow(parameter)
                    optimizer = torch_class([{"params": [own], **settings}], **options)
                    if in_backward and zero_states:
                        zeros = torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
                        optimizer.state[own] = {key: zeros.clone() for key in zero_states}
                    if own is not parameter:
                        _empty(own)
                    self.parts.append(_Part(optimizer, [name], group.shard(name)))
        if shared:
            self.parts.append(_Part(torch_class(shared, **options), names))
        self._part_of = {part.names[0]: part for part in self.parts if part.alone is not None}

    @torch.no_grad()
    def update(self, name: str, parameter: nn.Parameter, gradient: Tensor, finite: Tensor) -> None:
        """One parameter's step; see `collie_core.hookspecs.Optimizer`."""
        part = self._part_of[name]
        if finite.device.type != "cpu":  # torch's protocol for gradient scalers: 1 lets the kernel do nothing
            part.optimizer.found_inf = 1.0 - finite.float()  # type: ignore[attr-defined]
        elif not bool(finite):  # asking costs nothing on the CPU
            return
        self._update(part, gradient, finite)

    @cached_property
    def skips_on_device(self) -> bool:
        """See `collie_core.hookspecs.Optimizer`: every update is by the kernel."""
        return all(
            part.alone is not None and adam_triton.serves(part.optimizer, part.alone.local)
            for part in self.parts
        )

    def _update(self, part: _Part, gradient: Tensor, finite: Tensor, unasked: bool = False) -> None:
        """unasked: the host does not know yet whether it is `finite`."""
        assert part.alone is not None
        part.settings["lr"] = self.lr * part.settings["lr_scale"]
        if adam_triton.serves(part.optimizer, part.alone.local, gradient, finite):
            self._step_in_one(part, gradient, finite)
        elif not unasked or bool(finite):
            scale = (self.loss_scale, self.grad_scale, self.clip_grad_value)
            self._step_alone(part, scaled_gradient(gradient, *scale))

    @torch.no_grad()
    def update_all(self, gradients: Iterable[tuple[str, nn.Parameter, Tensor]], finite: Tensor) -> None:
        """Every parameter's step; see `collie_core.hookspecs.Optimizer`."""
        together, unasked = False, self.skips_on_device
        for name, parameter, gradient in gradients:
            if name in self._part_of:
                self._update(self._part_of[name], gradient, finite, unasked)
                parameter.grad = None
            else:
                scale = (self.loss_scale, self.grad_scale, self.clip_grad_value)
                parameter.grad = scaled_gradient(gradient, *scale)
                together = True
        if together:
            [part] = [part for part in self.parts if part.alone is None]
            for group in part.optimizer.param_groups:
                group["lr"] = self.lr * group["lr_scale"]
            _step(part.optimizer)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every parameter that has a gradient; the rate is lr times the group's factor."""
        for part in self.parts:
            for group in part.optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            if part.alone is None:
                _step(part.optimizer)
            elif part.alone.local.grad is not None:
                self._step_alone(part, part.alone.local.grad.float())

    def _step_in_one(self, part: _Part, gradient: Tensor, finite: Tensor) -> None:
        """The same by one kernel."""
        shard, [own] = part.alone, part.parameters
        assert shard is not None
        state = part.optimizer.state[own]
        if not state:
            zeros = {key: torch.zeros_like(shard.local, dtype=self.state_dtype) for key in adam_triton.STATES}
            state |= {"step": torch.zeros((), device=shard.local.device), **zeros}
            if self.state_dtype != torch.float32:
                part.narrow.update(zeros)
        adam_triton.step(
            shard.local.detach(),
            gradient,
            state,
            part.settings,
            Noise.of(self.seed, self.run.step + 1, shard),
            finite=finite,
            loss_scale=self.loss_scale,
            clip_value=self.clip_grad_value,
            grad_scale=self.grad_scale,
        )

    def _step_alone(self, part: _Part, gradient: Tensor) -> None:
        """gradient: fp32, of the parameter's shape."""
        assert part.alone is not None
        [own], parameter = part.parameters, part.alone.local
        state = part.optimizer.state[own]
        if own is not parameter:
            own.data = parameter.detach().float()
        own.grad = gradient
        for key, value in part.narrow.items():
            state[key] = value.float()
        _step(part.optimizer)
        own.grad = None
        if self.state_dtype != torch.float32:
            self._narrow(part, part.alone, state)
        if own is not parameter:
            self._round(parameter.detach(), own.detach(), part.alone, part.alone.name)
            _empty(own)

    def _narrow(self, part: _Part, shard: Shard, state: dict[str, Any]) -> None:
        """Round the states of elements stochastically; one that was not updated keeps every bit."""
        for key, value in state.items():
            if key != "step" and isinstance(value, Tensor) and value.shape == shard.local.shape:
                if key not in part.narrow:
                    part.narrow[key] = torch.zeros_like(value, dtype=self.state_dtype)
                self._round(part.narrow[key], value, shard, f"{shard.name}.{key}")
                state[key] = part.narrow[key]

    def _round(self, target: Tensor, value: Tensor, shard: Shard, name: str) -> None:
        step = self.run.step + 1
        round_to(
            target,
            value,
            seed=self.seed,
            step=step,
            name=name,
            offset=shard.offsets,
            global_shape=shard.shape,
        )

    def state_dict(self) -> dict[str, Tensor]:
        """`<parameter>.<state>`: torch's own state tensors, step counts included."""
        return {
            f"{name}.{key}": value
            for part in self.parts
            for name, parameter in zip(part.names, part.parameters, strict=True)
            for key, value in part.optimizer.state.get(parameter, {}).items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of state_dict; takes the tensors over, without copies of those of the right dtype.

        Raises CheckpointError for a state of an unknown parameter.
        """
        by_parameter: dict[str, dict[str, Tensor]] = {name: {} for part in self.parts for name in part.names}
        for full_name, value in state.items():
            name, _, key = full_name.rpartition(".")
            if name not in by_parameter:
                hint = nearest(name, by_parameter)
                raise CheckpointError(
                    f"optimizer state {full_name}: {name!r} is no parameter that is trained{hint}"
                )
            by_parameter[name][key] = value
        for part in self.parts:
            saved = part.optimizer.state_dict()
            saved["state"] = {
                index: by_parameter[name] for index, name in enumerate(part.names) if by_parameter[name]
            }
            part.optimizer.load_state_dict(saved)  # this makes fp32 of the states of fp32 parameters
            if part.alone is not None and self.state_dtype != torch.float32:
                part.narrow.clear()
                self._narrow(part, part.alone, part.optimizer.state[part.parameters[0]])


def _step(optimizer: torch.optim.Optimizer) -> None:
    """The step.  Each gradient lies in memory as its parameter does: torch's fused kernels refuse another,
    and those for the CPU take wrong elements of it."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is not None and gradient.stride() != parameter.stride():
                parameter.grad = torch.empty_like(parameter).copy_(gradient)
    optimizer.step()


def _shadow(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().float())


def _empty(shadow: nn.Parameter) -> None:
    shadow.grad = None
    shadow.data = torch.empty(0, device=shadow.device)
