"""Which linears an adapter is for, and what they are called in a checkpoint of the family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from collie_core.plugin import ConfigError, Rename, block_linears, fits, nearest

if TYPE_CHECKING:
    from collie_core.models.provider import SelectedProvider

SHORT = ("all-linear", "attention", "mlp")


def chosen(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Paths of the linears that `target_modules` means.  Raises ConfigError for a name that fits none."""
    known = block_linears(model)
    found: set[str] = set()
    for target in (targets,) if isinstance(targets, str) else targets:
        fitting = [path for path in known if _fits(path, target)]
        if not fitting:
            names = [*SHORT, *dict.fromkeys(path.rpartition(".")[2] for path in known)]
            raise ConfigError(
                f"target_modules: {target!r} fits no linear of the model's blocks{nearest(target, names)} "
                f"(known: {', '.join(names)})"
            )
        found.update(fitting)
    return [path for path in known if path in found]


def _fits(path: str, target: str) -> bool:
    if target in SHORT:
        in_attention = any("att" in part for part in path.split(".")[2:])  # attention, self_attn, attn, ...
        return target == "all-linear" or in_attention == (target == "attention")
    return fits(path, target)


def stock_names(source: SelectedProvider, model: nn.Module) -> dict[str, str]:
    """Path of each linear of the blocks -> its path in the family's own checkpoints.

    Empty where the stock model fuses some, so that it has no such linears.
    """
    weights = {
        rule.target: rule.source
        for rule in source.provider.weight_map(source.config)
        if isinstance(rule, Rename)
    }
    paths = block_linears(model)
    if any(f"{path}.weight" not in weights for path in paths):
        return {}
    return {path: weights[f"{path}.weight"].removesuffix(".weight") for path in paths}


def as_targets(paths: Sequence[str], known: Sequence[str]) -> list[str]:
    """`target_modules` of a file: last parts of the paths where they mean these alone, else whole paths."""
    leaves = {path.rpartition(".")[2] for path in paths}
    meant = [path for path in known if path.rpartition(".")[2] in leaves]
    return sorted(leaves if set(meant) == set(paths) else paths)
