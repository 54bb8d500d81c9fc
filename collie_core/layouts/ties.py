"""Parameters that are one under several names, and the stages that hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from collie_core.errors import PluginError

if TYPE_CHECKING:
    from collie_core.models.weight_map import ParallelPlan


def check_ties(plan: ParallelPlan, names: Mapping[str, str]) -> None:
    """Raise PluginError where the plan ties what the module holds apart.

    names: every parameter -> the first name of it.
    """
    for pair in plan.tied:
        unknown = [name for name in pair if name not in names]
        if unknown or names[pair[0]] != names[pair[1]]:
            why = f"the module has no {unknown[0]}" if unknown else "they are two parameters of the module"
            raise PluginError(f"the parallel plan ties {pair[0]} and {pair[1]}, but {why}")


def tied_over_ends(names: Mapping[str, str], keys: Sequence[str], stretches: Sequence[range]) -> set[str]:
    """First names of what the embedding and the head share, which are on two stages.

    keys: names of the blocks.  stretches: which of them each stage has.
    Raises PluginError for any other tie between stages.
    """
    last = len(stretches) - 1
    stage_of = {f"blocks.{keys[i]}": number for number, blocks in enumerate(stretches) for i in blocks}
    stage_of |= {"embed": 0, "head": last}
    found = set()
    for name, original in names.items():
        parts = {part_of(name), part_of(original)}
        if name == original or len({stage_of[part] for part in parts}) == 1:
            continue
        if parts != {"embed", "head"}:
            raise PluginError(
                f"{name} is tied to {original}, and pp_size {len(stretches)} puts them on different stages; "
                "only the embedding and the head can be tied between stages"
            )
        found.add(original)
    return found


def part_of(name: str) -> str:
    """`blocks.3` of `blocks.3.mlp.up_proj.weight`, or `embed`, or `head`."""
    first, _, rest = name.partition(".")
    return f"{first}.{rest.partition('.')[0]}" if first == "blocks" else first
