"""What a config selects: `optimizer: {name: lion}`, `adan`, `sophiag`, `adamw8bit`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from collie_core.errors import Refusal
from collie_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from torch import nn

    from collie_core.hookspecs import Layout, Optimizer
    from collie_core.run import Run

Beta = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]


@dataclass(frozen=True, kw_only=True)
class BackwardOptions:
    """in_backward: update each parameter in the backward pass and free its gradient at once.
    clip_mode: how the gradient norm is then learnt before the first update: docs/methods.md."""

    in_backward: bool = False
    clip_mode: Literal["auto", "two_pass", "keep"] = "auto"


@dataclass(frozen=True, kw_only=True)
class LionOptions(BackwardOptions):
    """betas: of the direction, and of the momentum.  state_dtype: of the momentum."""

    betas: tuple[Beta, Beta] = (0.9, 0.99)
    state_dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True, kw_only=True)
class AdanOptions(BackwardOptions):
    """betas: of the gradient, of its change, and of the squares.  state_dtype: of all four states."""

    betas: tuple[Beta, Beta, Beta] = (0.98, 0.92, 0.99)
    eps: Positive = 1e-8
    state_dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True, kw_only=True)
class SophiaGOptions(BackwardOptions):
    """betas: of the gradient, and of the Hessian, which is estimated every `hessian_every` steps.
    gamma: what it is multiplied with; the larger, the fewer elements of the update are clipped.
    state_dtype: of both states."""

    betas: tuple[Beta, Beta] = (0.96, 0.99)
    gamma: Positive = 0.05
    eps: Positive = 1e-12
    hessian_every: Annotated[int, Field(ge=1)] = 10
    state_dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True, kw_only=True)
class AdamW8bitOptions(BackwardOptions):
    """Those of adamw."""

    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: Positive = 1e-8


class _RuledPlugin(ABC):
    """What the plugins below have in common."""

    collie_api = 1
    default_lr: float
    default_weight_decay = 0.0
    supports: tuple[str, ...] = ("zero", "tp", "pp", "adapters", "state_dtype", "in_backward")

    def __init__(self, options: Any) -> None:
        self.options = options

    @hookimpl
    def collie_check(self, run: Run) -> list[str]:
        """A choice that nothing would heed."""
        if self.options.clip_mode == "auto" or self.options.in_backward:
            return []
        return ["optimizer.clip_mode: is of updates in the backward pass: set in_backward, or neither"]

    @hookimpl
    def collie_optimizer(self, model: nn.Module, layout: Layout, run: Run) -> Optimizer:
        """The optimizer over the final parameters of `model`."""
        import torch

        from collie_methods.optimizers.stores import Plain

        options = self.options
        dtype = getattr(torch, getattr(options, "state_dtype", "float32"))
        return self.make(
            {
                "groups": run.parameter_groups(model, self.default_lr, self.default_weight_decay),
                "store": lambda shard, key, signed: Plain(shard, key, dtype),
                "in_backward": options.in_backward,
                "two_pass": layout.needs_norm and options.clip_mode != "keep",
                "clip_grad_value": run.config.optimizer.clip_grad_value,
                "seed": run.seed,
            }
        )

    @abstractmethod
    def make(self, arguments: dict[str, Any]) -> Optimizer:
        """The optimizer; arguments: RuledOptimizer's, but for the rule."""


class LionPlugin(_RuledPlugin):
    """Lion: the sign of a momentum (Chen et al. 2023, arXiv 2302.06675)."""

    default_lr = 3e-6
    state_bytes = {"": {"element": 4}, "state_dtype: bfloat16": {"element": 2}}
    Options = LionOptions
    options: LionOptions

    def make(self, arguments: dict[str, Any]) -> Optimizer:
        """See the base class."""
        from collie_methods.optimizers.optimizer import RuledOptimizer
        from collie_methods.optimizers.rules import Lion

        return RuledOptimizer(rule=Lion(*self.options.betas), **arguments)


class AdanPlugin(_RuledPlugin):
    """Adan: adaptive Nesterov momentum (Xie et al. 2022, arXiv 2208.06677)."""

    default_lr = 5e-5
    state_bytes = {"": {"element": 16}, "state_dtype: bfloat16": {"element": 8}}
    Options = AdanOptions
    options: AdanOptions

    def make(self, arguments: dict[str, Any]) -> Optimizer:
        """See the base class."""
        from collie_methods.optimizers.optimizer import RuledOptimizer
        from collie_methods.optimizers.rules import Adan

        rule = Adan(*self.options.betas, self.options.eps)
        return RuledOptimizer(rule=rule, **arguments)


class SophiaGPlugin(_RuledPlugin):
    """SophiaG: momentum over a clipped estimate of the Hessian (Liu et al. 2023, arXiv 2305.14342)."""

    default_lr = 1e-5
    state_bytes = {"": {"element": 8}, "state_dtype: bfloat16": {"element": 4}}
    Options = SophiaGOptions
    options: SophiaGOptions

    def make(self, arguments: dict[str, Any]) -> Optimizer:
        """See the base class."""
        from collie_methods.optimizers.rules import SophiaG
        from collie_methods.optimizers.sophia import SophiaGOptimizer

        options = self.options
        rule = SophiaG(*options.betas, options.gamma, options.eps)
        return SophiaGOptimizer(rule=rule, every=options.hessian_every, **arguments)


class AdamW8bitPlugin(_RuledPlugin):
    """AdamW with 8-bit states (Dettmers et al. 2021, arXiv 2110.02861), on CUDA, by bitsandbytes."""

    default_lr = 2e-5
    default_weight_decay = 0.01
    state_bytes = {"": {"matrix element": 2.03125, "vector element": 8}}
    supports = ("zero", "pp", "adapters", "in_backward")
    Options = AdamW8bitOptions
    options: AdamW8bitOptions

    @hookimpl
    def collie_check(self, run: Run) -> list[str]:
        """Where the library or its device is not there, and rows that are cut."""
        found = super().collie_check(run)
        if find_spec("bitsandbytes") is None:
            found.append(
                "optimizer: adamw8bit needs bitsandbytes, which is not installed: "
                "pip install 'collie-optimizers[eightbit]'; or take adamw with state_dtype: bfloat16"
            )
        if run.source is not None and run.device.type != "cuda":  # the device is known once there is a model
            found.append(
                Refusal(
                    f"optimizer adamw8bit on {run.device.type}",
                    "its 8-bit states are served on CUDA alone",
                    {"optimizer": {"name": "adamw", "state_dtype": "bfloat16"}},
                    "train on a GPU, or take adamw with state_dtype: bfloat16",
                )
            )
        if run.config.tp_size > 1:
            found.append(
                Refusal(
                    "optimizer adamw8bit with tp_size",
                    "a block of 8-bit states is a stretch of a row, and tensor parallelism cuts rows",
                    {"tp_size": 1},
                    "set tp_size to 1 (zero_stage shares its states), or take adamw with state_dtype: "
                    "bfloat16",
                )
            )
        return found

    def make(self, arguments: dict[str, Any]) -> Optimizer:
        """See the base class."""
        from collie_methods.optimizers.eight_bit import AdamW8bit
        from collie_methods.optimizers.rules import AdamW
        from collie_methods.optimizers.stores import eight_bit

        rule = AdamW(*self.options.betas, self.options.eps)
        return AdamW8bit(rule=rule, **arguments | {"store": eight_bit})
