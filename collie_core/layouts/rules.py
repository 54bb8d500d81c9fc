"""What the native layout refuses, as one table: from it come the errors, `config check --explain` and the docs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collie_core.config.schema import CollieConfig
    from collie_core.layouts.native import NativeLayoutPlugin

    Applies = Callable[[CollieConfig, NativeLayoutPlugin.Options], bool]


@dataclass(frozen=True)
class Rule:
    """A combination that is refused: its keys, the reason, and the nearest combination that works."""

    keys: str
    reason: str
    instead: str
    applies: Applies


RULES: tuple[Rule, ...] = (
    Rule(
        "layout.pp_partition",
        "it must give every stage of the pipeline at least one block: one number for each",
        "set one number of blocks for each of pp_size stages (times pp_stretches if interleaved), or parameters",
        lambda config, options: (
            not isinstance(options.pp_partition, str)
            and (
                len(options.pp_partition) != config.pp_size * options.chunks(config.pp_size)
                or min(options.pp_partition) < 1
            )
        ),
    ),
    Rule(
        "layout.pp_microbatches",
        "a step batch is cut into at least one micro-batch",
        "set it to auto, or to at least pp_size to keep all stages at work",
        lambda config, options: options.pp_microbatches != "auto" and options.pp_microbatches < 1,
    ),
    Rule(
        "layout.pp_stretches",
        "an interleaved pipeline has at least 2 stretches of blocks a rank",
        "set it to 2, or pp_schedule to 1f1b",
        lambda config, options: options.pp_schedule == "interleaved" and options.pp_stretches < 2,
    ),
    Rule(
        "layout.sequence_parallel",
        "it cuts activations among tensor-parallel ranks, and there is one",
        "set sequence_parallel to auto, or tp_size above 1",
        lambda config, options: options.sequence_parallel is True and config.tp_size == 1,
    ),
    Rule(
        "layout.offload with train.compile: true",
        "weights that come from host memory are not there when a compiled block is traced",
        "set train.compile to false, or offload to none",
        lambda config, options: options.offload == "cpu" and config.train.compile is True,
    ),
)


def refusals(config: CollieConfig, options: NativeLayoutPlugin.Options) -> list[str]:
    """Every rule that refuses this config: keys, reason, and what works."""
    return [
        f"{rule.keys}: {rule.reason}; {rule.instead}" for rule in RULES if rule.applies(config, options)
    ]

