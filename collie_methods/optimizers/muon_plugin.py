"""What a config selects: `optimizer: {name: muon}`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from collie_core.errors import Refusal
from collie_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from torch import nn

    from collie_core.hookspecs import Optimizer
    from collie_core.run import Run

Beta = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True, kw_only=True)
class MuonOptions:
    """momentum, nesterov, ns_steps: Muon's, for the matrices of the blocks.
    betas, eps: AdamW's, for the rest."""

    momentum: Beta = 0.95
    nesterov: bool = True
    ns_steps: Annotated[int, Field(ge=1, lt=100)] = 5
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8


class MuonPlugin:
    """Muon: momentum made orthogonal (Jordan et al. 2024), for the blocks' matrices; AdamW for the rest."""

    collie_api = 1
    elementwise = False
    default_lr = 6e-5
    state_bytes = {"": {"block matrix element": 4, "other element": 8}}
    supports = ("pp", "adapters")
    Options = MuonOptions

    def __init__(self, options: MuonOptions) -> None:
        self.options = options

    @hookimpl
    def collie_check(self, run: Run) -> list[str]:
        """Layouts that cut parameters."""
        config = run.config
        zero = config.dp_size > 1 and config.layout.options.get("zero_stage")
        if not zero and config.tp_size == 1:
            return []
        instead = {"tp_size": 1} if config.tp_size > 1 else {}
        return [
            Refusal(
                "optimizer muon with tp_size or layout.zero_stage",
                "it makes whole matrices orthogonal, and these cut them",
                {**instead, "layout.zero_stage": 0} if zero else instead,
                "set tp_size to 1 and layout.zero_stage to 0, or take an optimizer that works on each "
                "element by itself, such as adamw",
            )
        ]

    @hookimpl
    def collie_optimizer(self, model: nn.Module, run: Run) -> Optimizer:
        """The optimizer over the final parameters of `model`."""
        from collie_methods.optimizers.muon import MuonOptimizer

        groups = run.parameter_groups(model, self.default_lr, 0.01)
        return MuonOptimizer(groups, self.options, run)
