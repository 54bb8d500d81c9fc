"""torch's optimizers as plugins: `optimizer: {name: adamw, betas: [0.9, 0.95]}`.

The options are those of the torch constructor, and those of `_OURS`.  fp32 parameters are updated by torch
as they are.  For bf16 and fp16 parameters the update is computed in fp32, on a copy of one parameter at a
time, then written back as `round_to` does; so are states where `state_dtype` is bfloat16 (rounded to nearest,
Adam's second moment would never decay).
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from functools import cache
from types import GenericAlias
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from collie_core.errors import Refusal
from collie_core.hookspecs import hookimpl

if TYPE_CHECKING:
    import torch
    from torch import nn

    from collie_core.hookspecs import Layout, Optimizer
    from collie_core.run import Run

#: Arguments of a torch constructor that are the core's (`lr`, `weight_decay`) or the engine's own business.
_NOT_OPTIONS = frozenset({"params", "lr", "weight_decay", "foreach", "capturable", "differentiable", "fused"})

#: Options that torch does not have: key -> (type, default).
_OURS: dict[str, tuple[Any, Any]] = {
    "in_backward": (bool, False),  # update each parameter in the backward pass and free its gradient
    "clip_mode": (Literal["auto", "two_pass", "keep"], "auto"),  # how it learns the norm: docs/methods.md
    "state_dtype": (Literal["float32", "bfloat16"], "float32"),  # of the states of a parameter's elements
}

_FROM_0, _BELOW_1 = Field(ge=0), Field(ge=0, lt=1)
#: What torch's constructors refuse, told by key: option -> limits of a number, or of each in a tuple.
_LIMITS: dict[str, Any] = {
    **dict.fromkeys(("eps", "lr_decay", "initial_accumulator_value", "momentum", "momentum_decay"), _FROM_0),
    "betas": _BELOW_1,
    "rho": Field(ge=0, le=1),
    "beta2_decay": Field(le=0),
    "d": Field(ge=1),
    "etas": (Field(gt=0, lt=1), Field(gt=1)),
    "RMSprop.alpha": _FROM_0,  # that of ASGD may be any
}


class _ConstructorOptions:
    """The class attribute `Options`, made when first asked for, since that imports torch."""

    def __get__(self, instance: object, owner: type) -> type:
        assert issubclass(owner, TorchOptimizerPlugin)
        ours = ["in_backward", "clip_mode"] if owner.fused else []
        return _options_of(owner.__name__, (*ours, "state_dtype") if owner.elementwise else tuple(ours))


class TorchOptimizerPlugin:
    """Base of the plugins below; a subclass has the name of its class in `torch.optim`."""

    collie_api = 1
    in_backward = False
    default_lr: float
    fused = False  # one kernel, which can leave a parameter alone, as updates in the backward pass must
    elementwise = True  # else it needs every parameter whole
    supports: tuple[str, ...] = ("zero", "tp", "pp", "deepspeed", "adapters", "state_dtype")
    Options = _ConstructorOptions()

    def __init__(self, options: Any) -> None:
        self.options = options

    @hookimpl
    def collie_check(self, run: Run) -> Sequence[str]:
        """Options that contradict each other or the layout, and weight decay where torch has none."""
        import torch

        section, arguments = run.config.optimizer, _parameters_of(type(self).__name__)
        wants_decay = section.weight_decay or any(group.weight_decay for group in section.param_groups)
        if wants_decay and "weight_decay" not in arguments:
            return [f"optimizer.weight_decay: {section.name} has no weight decay; set it to 0"]
        try:  # a check of a newer torch, which `_LIMITS` lacks
            self.torch_class([torch.nn.Parameter(torch.zeros(1))], **self.constructor_options)
        except ValueError as error:
            return [f"optimizer: torch's {type(self).__name__} refuses its options: {error}"]
        if self._ours("clip_mode") != "auto" and not self._ours("in_backward"):
            return ["optimizer.clip_mode: is of updates in the backward pass: set in_backward, or neither"]
        zero = run.config.dp_size > 1 and run.config.layout.options.get("zero_stage")
        if not self.elementwise and (zero or run.config.tp_size > 1):
            instead = {"tp_size": 1} if run.config.tp_size > 1 else {}
            return [
                Refusal(
                    "optimizer with tp_size or layout.zero_stage",
                    f"{section.name} needs every parameter whole",
                    {**instead, "layout.zero_stage": 0} if zero else instead,
                    "set tp_size to 1 and layout.zero_stage to 0, or take an optimizer that works on each "
                    "element by itself, such as adamw",
                )
            ]
        return []

    @hookimpl
    def collie_optimizer(self, model: nn.Module, layout: Layout, run: Run) -> Optimizer:
        """The optimizer over the final parameters of `model`."""
        import torch

        from collie_core.optimizers.shadowed import ShadowedOptimizer

        arguments = _parameters_of(type(self).__name__)
        decay = arguments["weight_decay"].default if "weight_decay" in arguments else 0.0
        options = self.constructor_options
        groups = run.parameter_groups(model, default_lr=self.default_lr, default_weight_decay=decay)
        # on the CPU it takes a third of the time, and for granted that all tensors are contiguous
        parameters = (parameter for group in groups for parameter in group.parameters.values())
        if self.fused and all(p.device.type == "cuda" or p.is_contiguous() for p in parameters):
            options["fused"] = True
        return ShadowedOptimizer(
            self.torch_class,
            groups,
            options,
            run,
            in_backward=self._ours("in_backward"),
            two_pass=layout.needs_norm and self._ours("clip_mode") != "keep",
            clip_grad_value=run.config.optimizer.clip_grad_value,
            zero_states=self.zero_states(),
            state_dtype=getattr(torch, self._ours("state_dtype")),
        )

    def zero_states(self) -> tuple[str, ...]:
        """States that are zero before the first step, though torch makes them of the first gradient."""
        return ()

    def _ours(self, key: str) -> Any:
        return getattr(self.options, key, _OURS[key][1])

    @property
    def constructor_options(self) -> dict[str, Any]:
        """Those of torch's own."""
        return {key: value for key, value in dataclasses.asdict(self.options).items() if key not in _OURS}

    @property
    def torch_class(self) -> type[torch.optim.Optimizer]:
        """The class in torch.optim."""
        import torch

        found: type[torch.optim.Optimizer] = getattr(torch.optim, type(self).__name__)
        return found


def _parameters_of(name: str) -> Mapping[str, inspect.Parameter]:
    import torch

    return inspect.signature(getattr(torch.optim, name)).parameters


@cache
def _options_of(name: str, ours: tuple[str, ...]) -> type:
    """A frozen dataclass with the constructor's options and defaults, and some of `_OURS`."""
    fields: list[Any] = [
        (
            key,
            _type_of(parameter.default, _LIMITS.get(f"{name}.{key}", _LIMITS.get(key))),
            dataclasses.field(default=_plain(parameter.default)),
        )
        for key, parameter in _parameters_of(name).items()
        if key not in _NOT_OPTIONS
    ]
    fields += [(key, _OURS[key][0], dataclasses.field(default=_OURS[key][1])) for key in ours]
    return dataclasses.make_dataclass("Options", fields, frozen=True, kw_only=True)


def _type_of(default: Any, limits: Any = None) -> Any:
    """The type of an option, from its default; a number may be any float within `limits`."""
    if isinstance(default, bool):
        return bool
    if isinstance(default, tuple):
        each = limits if isinstance(limits, tuple) else (limits,) * len(default)
        return GenericAlias(tuple, tuple(map(_type_of, default, each)))
    number: Any = float if limits is None else Annotated[float, limits]
    return number if default is not None else number | None


def _plain(default: Any) -> Any:
    return float(default) if isinstance(default, int) and not isinstance(default, bool) else default


class Adadelta(TorchOptimizerPlugin):
    """Adadelta (Zeiler 2012, arXiv 1212.5701)."""

    default_lr = 1.0
    state_bytes = {"": {"element": 8}, "state_dtype: bfloat16": {"element": 4}}


class Adafactor(TorchOptimizerPlugin):
    """Adafactor (Shazeer and Stern 2018, arXiv 1804.04235)."""

    default_lr = 1e-3
    state_bytes = {"": {"row": 4, "column": 4, "vector element": 4}}
    elementwise = False
    supports = ("pp", "adapters")


class Adagrad(TorchOptimizerPlugin):
    """Adagrad (Duchi et al. 2011)."""

    default_lr = 1e-3
    state_bytes = {"": {"element": 4}, "state_dtype: bfloat16": {"element": 2}}


class Adam(TorchOptimizerPlugin):
    """Adam (Kingma and Ba 2014, arXiv 1412.6980)."""

    default_lr = 2e-5
    state_bytes = {"": {"element": 8}, "state_dtype: bfloat16": {"element": 4}}
    fused = True
    supports = ("zero", "tp", "pp", "deepspeed", "adapters", "state_dtype", "in_backward")


class Adamax(TorchOptimizerPlugin):
    """Adamax (Kingma and Ba 2014, arXiv 1412.6980, section 7.1)."""

    default_lr = 4e-5
    state_bytes = {"": {"element": 8}, "state_dtype: bfloat16": {"element": 4}}


class AdamW(TorchOptimizerPlugin):
    """AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101)."""

    default_lr = 2e-5
    state_bytes = {"": {"element": 8}, "state_dtype: bfloat16": {"element": 4}}
    fused = True
    supports = ("zero", "tp", "pp", "deepspeed", "adapters", "state_dtype", "in_backward")


class ASGD(TorchOptimizerPlugin):
    """Averaged stochastic gradient descent (Polyak and Juditsky 1992)."""

    default_lr = 1e-2
    state_bytes = {"": {"element": 4}, "state_dtype: bfloat16": {"element": 2}}


class NAdam(TorchOptimizerPlugin):
    """Adam with Nesterov momentum (Dozat 2016)."""

    default_lr = 2e-5
    state_bytes = {"": {"element": 8}, "state_dtype: bfloat16": {"element": 4}}


class RAdam(TorchOptimizerPlugin):
    """Rectified Adam (Liu et al. 2019, arXiv 1908.03265)."""

    default_lr = 2e-5
    state_bytes = {"": {"element": 8}, "state_dtype: bfloat16": {"element": 4}}


class RMSprop(TorchOptimizerPlugin):
    """RMSprop (Tieleman and Hinton 2012)."""

    default_lr = 1e-5
    state_bytes = {"": {"element": 4}, "state_dtype: bfloat16": {"element": 2}}


class Rprop(TorchOptimizerPlugin):
    """Resilient backpropagation (Riedmiller and Braun 1993); meant for full batches."""

    default_lr = 1e-5
    state_bytes = {"": {"element": 8}, "state_dtype: bfloat16": {"element": 4}}


class SGD(TorchOptimizerPlugin):
    """Stochastic gradient descent, with momentum if asked."""

    default_lr = 2e-2
    state_bytes = {
        "": {"element": 0},
        "momentum: 0.9": {"element": 4},
        "momentum: 0.9, state_dtype: bfloat16": {"element": 2},
    }
    fused = True
    supports = ("zero", "tp", "pp", "deepspeed", "adapters", "state_dtype", "in_backward")

    @hookimpl
    def collie_check(self, run: Run) -> Sequence[str]:
        """As all of torch's, what Nesterov's momentum needs, and a first step that is like no other."""
        momentum, dampening = self.options.momentum, self.options.dampening
        if self.options.nesterov and (not momentum or dampening):
            return [
                "optimizer.nesterov: expected false, or true with momentum > 0 and dampening 0, got true "
                f"with momentum {momentum:g} and dampening {dampening:g}"
            ]
        found = list(super().collie_check(run))
        if self.options.in_backward and self.options.dampening:
            found.append(
                Refusal(
                    "optimizer.in_backward with optimizer.dampening",
                    "torch does not dampen the first step, and a step that is skipped may come before it",
                    {"optimizer.dampening": 0.0},
                    "set dampening to 0, or in_backward to false",
                )
            )
        return found

    def zero_states(self) -> tuple[str, ...]:
        """The momentum."""
        return ("momentum_buffer",) if self.options.momentum else ()
