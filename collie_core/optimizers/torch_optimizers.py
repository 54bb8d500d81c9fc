"""torch's optimizers as plugins: `optimizer: {name: adamw, betas: [0.9, 0.95]}`.

The options are those of the torch constructor.  fp32 parameters are updated by torch as they are.  For bf16
and fp16 parameters the state is kept and the update computed in fp32, on a copy of one parameter at a time
(kept in bf16, Adam's second moment would never decay), then written back as `round_to` does.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from functools import cache
from types import GenericAlias
from typing import TYPE_CHECKING, Any

from collie_core.errors import Refusal
from collie_core.hookspecs import hookimpl

if TYPE_CHECKING:
    import torch
    from torch import nn

    from collie_core.hookspecs import Optimizer
    from collie_core.run import Run

#: Arguments of a torch constructor that are the core's (`lr`, `weight_decay`) or the engine's own business.
_NOT_OPTIONS = frozenset({"params", "lr", "weight_decay", "foreach", "capturable", "differentiable", "fused"})


class _ConstructorOptions:
    """The class attribute `Options`, made when first asked for, since that imports torch."""

    def __get__(self, instance: object, owner: type) -> type:
        return _options_of(owner.__name__)


class TorchOptimizerPlugin:
    """Base of the plugins below; a subclass has the name of its class in `torch.optim`."""

    collie_api = 1
    in_backward = False
    default_lr: float
    fused_on_cuda = False
    elementwise = True  # else it needs every parameter whole
    Options = _ConstructorOptions()

    def __init__(self, options: Any) -> None:
        self.options = options

    @hookimpl
    def collie_check(self, run: Run) -> Sequence[str]:
        """Values that torch refuses, and weight decay where it has none."""
        import torch

        section, arguments = run.config.optimizer, _parameters_of(type(self).__name__)
        wants_decay = section.weight_decay or any(group.weight_decay for group in section.param_groups)
        if wants_decay and "weight_decay" not in arguments:
            return [f"optimizer.weight_decay: {section.name} has no weight decay; set it to 0"]
        try:
            self.torch_class([torch.nn.Parameter(torch.zeros(1))], **dataclasses.asdict(self.options))
        except ValueError as error:
            return [f"optimizer: torch's {type(self).__name__} refuses its options: {error}"]
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
    def collie_optimizer(self, model: nn.Module, run: Run) -> Optimizer:
        """The optimizer over the final parameters of `model`."""
        from collie_core.optimizers.shadowed import ShadowedOptimizer

        arguments = _parameters_of(type(self).__name__)
        decay = arguments["weight_decay"].default if "weight_decay" in arguments else 0.0
        options = dataclasses.asdict(self.options)
        if self.fused_on_cuda and run.device.type == "cuda":
            options["fused"] = True
        groups = run.parameter_groups(model, default_lr=self.default_lr, default_weight_decay=decay)
        return ShadowedOptimizer(self.torch_class, groups, options, run)

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
def _options_of(name: str) -> type:
    """A frozen dataclass with the constructor's options and defaults."""
    fields: list[Any] = [
        (key, _type_of(parameter.default), dataclasses.field(default=_plain(parameter.default)))
        for key, parameter in _parameters_of(name).items()
        if key not in _NOT_OPTIONS
    ]
    return dataclasses.make_dataclass("Options", fields, frozen=True, kw_only=True)


def _type_of(default: Any) -> Any:
    """The type of an option, from its default; a number may be any float."""
    if isinstance(default, bool):
        return bool
    if isinstance(default, tuple):
        return GenericAlias(tuple, tuple(_type_of(item) for item in default))
    return float if default is not None else float | None


def _plain(default: Any) -> Any:
    return float(default) if isinstance(default, int) and not isinstance(default, bool) else default


class Adadelta(TorchOptimizerPlugin):
    """Adadelta (Zeiler 2012, arXiv 1212.5701)."""

    default_lr = 1.0


class Adafactor(TorchOptimizerPlugin):
    """Adafactor (Shazeer and Stern 2018, arXiv 1804.04235)."""

    default_lr = 1e-3
    elementwise = False


class Adagrad(TorchOptimizerPlugin):
    """Adagrad (Duchi et al. 2011)."""

    default_lr = 1e-3


class Adam(TorchOptimizerPlugin):
    """Adam (Kingma and Ba 2014, arXiv 1412.6980)."""

    default_lr = 2e-5
    fused_on_cuda = True


class Adamax(TorchOptimizerPlugin):
    """Adamax (Kingma and Ba 2014, arXiv 1412.6980, section 7.1)."""

    default_lr = 4e-5


class AdamW(TorchOptimizerPlugin):
    """AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101)."""

    default_lr = 2e-5
    fused_on_cuda = True


class ASGD(TorchOptimizerPlugin):
    """Averaged stochastic gradient descent (Polyak and Juditsky 1992)."""

    default_lr = 1e-2


class NAdam(TorchOptimizerPlugin):
    """Adam with Nesterov momentum (Dozat 2016)."""

    default_lr = 2e-5


class RAdam(TorchOptimizerPlugin):
    """Rectified Adam (Liu et al. 2019, arXiv 1908.03265)."""

    default_lr = 2e-5


class RMSprop(TorchOptimizerPlugin):
    """RMSprop (Tieleman and Hinton 2012)."""

    default_lr = 1e-5


class Rprop(TorchOptimizerPlugin):
    """Resilient backpropagation (Riedmiller and Braun 1993); meant for full batches."""

    default_lr = 1e-5


class SGD(TorchOptimizerPlugin):
    """Stochastic gradient descent, with momentum if asked."""

    default_lr = 1e-2
    fused_on_cuda = True
