"""What the native layout refuses, as one table: errors, `config check --explain` and docs come from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from collie_core.errors import Refusal

if TYPE_CHECKING:
    from collie_core.config.schema import CollieConfig
    from collie_core.layouts.options import NativeOptions

    Applies = Callable[[CollieConfig, NativeOptions], bool]
    Instead = Callable[[CollieConfig, NativeOptions], dict[str, Any]]


@dataclass(frozen=True)
class Rule:
    """A combination that is refused.

    keys: which do not go together.  reason: why.  advice: what works, in words.  applies: whether a config
    is refused, and instead: the keys, with values, of the nearest one that is not; None where that needs
    the model's own sizes: it is then refused when the model has been read, before it has any memory.
    """

    keys: str
    reason: str
    advice: str
    applies: Applies | None = None
    instead: Instead | None = None


def _stages(config: CollieConfig, options: NativeOptions) -> int:
    return config.pp_size * options.stretches(config.pp_size)


def _wrong_partition(config: CollieConfig, options: NativeOptions) -> bool:
    counts = options.pp_partition
    return not isinstance(counts, str) and (len(counts) != _stages(config, options) or min(counts) < 1)


RULES: tuple[Rule, ...] = (
    Rule(
        "layout.pp_partition with pp_size",
        "every stage of the pipeline has at least one block, so it is one number for each",
        "set it to parameters, or to pp_size numbers of blocks (pp_size x pp_stretches if interleaved)",
        _wrong_partition,
        lambda config, options: {"layout.pp_partition": "parameters"},
    ),
    Rule(
        "layout.pp_microbatches",
        "a step batch is cut into at least one micro-batch",
        "set it to auto, or to at least pp_size to keep all stages at work",
        lambda config, options: options.pp_microbatches != "auto" and options.pp_microbatches < 1,
        lambda config, options: {"layout.pp_microbatches": "auto"},
    ),
    Rule(
        "layout.pp_stretches with layout.pp_schedule: interleaved",
        "an interleaved pipeline has at least 2 stretches of blocks a rank",
        "set it to 2, or pp_schedule to 1f1b",
        lambda config, options: options.pp_schedule == "interleaved" and options.pp_stretches < 2,
        lambda config, options: {"layout.pp_stretches": 2},
    ),
    Rule(
        "layout.sequence_parallel: true with tp_size: 1",
        "it cuts activations among tensor-parallel ranks, and there is one",
        "set sequence_parallel to auto, or tp_size above 1",
        lambda config, options: options.sequence_parallel is True and config.tp_size == 1,
        lambda config, options: {"layout.sequence_parallel": "auto"},
    ),
    Rule(
        "layout.offload: cpu with train.compile: true",
        "weights that come from host memory are not there when a compiled block is traced",
        "set train.compile to false, or offload to none",
        lambda config, options: options.offload == "cpu" and config.train.compile is True,
        lambda config, options: {"train.compile": False},
    ),
    Rule(
        "layout.offload: cpu with layout.zero_stage: 0 and dp_size above 1",
        "it is ZeRO that moves weights to and from host memory, and it cuts them",
        "set zero_stage to 3, or offload to none",
        lambda config, options: (
            options.offload == "cpu" and options.zero_stage == 0 and config.dp_size > 1
        ),
        lambda config, options: {"layout.zero_stage": 3},
    ),
    Rule(
        "pp_size",
        "every stage (with interleaved, every stretch) has at least one of the model's blocks",
        "set pp_size, times pp_stretches if interleaved, to the number of blocks at most",
    ),
    Rule(
        "layout.pp_partition",
        "its numbers add up to the model's blocks",
        "make them add up, or set it to parameters or uniform",
    ),
    Rule(
        "tp_size",
        "each rank has whole attention heads: it divides their number, and of it and the number of key-value "
        "heads one divides the other",
        "set tp_size to a divisor of both",
    ),
    Rule(
        "tp_size or pp_size above 1 with a model given as an object with weights",
        "every rank would have to hold the whole model, and throw away what it does not need",
        "give the model as a path, or set dp_size only",
    ),
)


def refusals(config: CollieConfig, options: NativeOptions) -> list[Refusal]:
    """Every rule that refuses this config before the model is read."""
    return [
        Refusal(rule.keys, rule.reason, rule.instead(config, options), rule.advice)
        for rule in RULES
        if rule.applies is not None and rule.instead is not None and rule.applies(config, options)
    ]
