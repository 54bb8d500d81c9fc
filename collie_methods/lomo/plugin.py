"""What a config selects: `optimizer: {name: lomo}` and `{name: adalomo}`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from collie_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from torch import nn

    from collie_core.hookspecs import Layout, Optimizer
    from collie_core.run import Run


@dataclass(frozen=True, kw_only=True)
class FusedOptions:
    """Keys of `optimizer:` beside the core's.

    clip_mode: how the gradient norm is learnt before the first update, where one is needed (clip_grad_norm,
    float16).  two_pass: a forward and backward pass more, no gradient is kept; keep: one pass, all gradients
    are kept until its end; auto: two_pass.  A step of several micro-batches keeps its gradients anyway.
    """

    clip_mode: Literal["auto", "two_pass", "keep"] = "auto"


class LomoPlugin:
    """LOMO: gradient descent fused with the backward pass (Lv et al. 2023, arXiv 2306.09782)."""

    collie_api = 1
    in_backward = True
    default_lr = 2e-2
    default_lr_clipped = 1e-1  # clipped steps are shorter; see the table of docs/methods.md
    state_bytes = {"": {"element": 0}}
    supports = ("zero", "tp", "pp", "adapters")
    Options = FusedOptions

    def __init__(self, options: FusedOptions) -> None:
        self.options = options

    @hookimpl
    def collie_optimizer(self, model: nn.Module, layout: Layout, run: Run) -> Optimizer:
        """The optimizer over the final parameters of `model`."""
        from collie_methods.lomo.optimizer import LomoOptimizer

        return LomoOptimizer(**_arguments(self.default_lr, self.options, model, layout, run))


class AdaLomoPlugin:
    """AdaLomo: LOMO with rates from a factored second moment (Lv et al. 2023, arXiv 2310.10195)."""

    collie_api = 1
    in_backward = True
    default_lr = 5e-4
    state_bytes = {"": {"row": 4, "column": 4, "vector element": 4}}
    supports = ("zero", "tp", "pp", "adapters")
    Options = FusedOptions

    def __init__(self, options: FusedOptions) -> None:
        self.options = options

    @hookimpl
    def collie_optimizer(self, model: nn.Module, layout: Layout, run: Run) -> Optimizer:
        """The optimizer over the final parameters of `model`."""
        from collie_methods.lomo.optimizer import AdaLomoOptimizer

        return AdaLomoOptimizer(**_arguments(self.default_lr, self.options, model, layout, run))


def _arguments(
    default_lr: float, options: FusedOptions, model: nn.Module, layout: Layout, run: Run
) -> dict[str, Any]:
    return {
        "groups": run.parameter_groups(model, default_lr=default_lr, default_weight_decay=0.0),
        "two_pass": layout.needs_norm and options.clip_mode != "keep",
        "clip_grad_value": run.config.optimizer.clip_grad_value,
        "seed": run.seed,
    }
