"""torch's Muon and AdamW side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from collie_core.optimizers.fused import FusedOptimizer
from collie_core.optimizers.shadowed import ShadowedOptimizer
from collie_core.run import ParameterGroup
from collie_methods.optimizers.muon_plugin import MuonOptions

if TYPE_CHECKING:
    from collie_core.run import Run


class MuonOptimizer(FusedOptimizer):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) for matrices of the blocks, AdamW
    for embeddings, head, norms and biases.

    Updates of matrices have AdamW's root mean square (Liu et al. 2025, arXiv 2502.16982, equation 4), so
    one learning rate serves both.
    """

    def __init__(self, groups: Sequence[ParameterGroup], options: MuonOptions, run: Run) -> None:
        super().__init__(groups, in_backward=False, seed=run.seed)
        ours = {"momentum": options.momentum, "nesterov": options.nesterov, "ns_steps": options.ns_steps}
        adam = {"betas": options.betas, "eps": options.eps}
        muon_options = ours | {"adjust_lr_fn": "match_rms_adamw"}
        self.parts = [
            ShadowedOptimizer(torch.optim.Muon, _those(groups, True), muon_options, run),
            ShadowedOptimizer(torch.optim.AdamW, _those(groups, False), adam, run),
        ]

    def step(self, lr: float) -> None:
        """Every parameter's step; see `collie_core.hookspecs.Optimizer`."""
        for part in self.parts:
            part.step(lr)

    def state_dict(self) -> dict[str, Tensor]:
        """`<parameter>.<state>`: torch's own state tensors."""
        return {name: value for part in self.parts for name, value in part.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of state_dict.  Raises CheckpointError for a state of an unknown parameter."""
        muon, rest = self.parts
        mine = {name: value for name, value in state.items() if name.rpartition(".")[0] in muon.group_of}
        muon.load_state_dict(mine)
        rest.load_state_dict({name: value for name, value in state.items() if name not in mine})


def _those(groups: Sequence[ParameterGroup], matrices: bool) -> list[ParameterGroup]:
    """The groups with the blocks' matrices alone, or without them."""
    return [
        replace(group, parameters=members)
        for group in groups
        if (members := {n: p for n, p in group.parameters.items() if _of_block(n, p) == matrices})
    ]


def _of_block(name: str, parameter: Tensor) -> bool:
    return name.startswith("blocks.") and parameter.ndim == 2
