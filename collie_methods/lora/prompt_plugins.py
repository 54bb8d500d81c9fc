"""What a config selects: `adapters: [{name: prompt_tuning}]`, `{name: p_tuning}`, `{name: prefix_tuning}`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from collie_core.hookspecs import hookimpl
from collie_methods.lora.plugin import beside_path, deepspeed_zero3, same_names, saved_config

if TYPE_CHECKING:
    from collie_core.hookspecs import Adapter
    from collie_core.run import Run

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, kw_only=True)
class VirtualOptions:
    """Keys that all three have.

    num_virtual_tokens: before every record, of data.max_length a part.  adapter_name: tells several adapters
    apart.  path: the folder of an adapter to go on with, which says the number.
    """

    num_virtual_tokens: Count = 20
    adapter_name: Name = "default"
    path: str | None = None


@dataclass(frozen=True, kw_only=True)
class PromptTuningOptions(VirtualOptions):
    """prompt_tuning_init: vectors of words that are drawn, of the words of prompt_tuning_init_text, or random
    (normal, deviation 0.02)."""

    prompt_tuning_init: Literal["sample_vocab", "text", "random"] = "sample_vocab"
    prompt_tuning_init_text: str | None = None


@dataclass(frozen=True, kw_only=True)
class PTuningOptions(VirtualOptions):
    """encoder_hidden_size: width of the encoder's two inner layers; null: the model's hidden width."""

    encoder_hidden_size: Count | None = None


@dataclass(frozen=True, kw_only=True)
class PrefixTuningOptions(VirtualOptions):
    """init_weights: of keys and values: normal (deviation 0.02) or zero."""

    init_weights: Literal["normal", "zero"] = "normal"


class _VirtualPlugin:
    """What the plugins below have in common."""

    collie_api = 1
    supports = ("zero", "tp", "pp", "deepspeed", "packing")

    def __init__(self, options: Any) -> None:
        self.options, self.virtual_tokens = options, _virtual_tokens(options)

    @hookimpl
    def collie_check(self, run: Run) -> list[str]:
        """What contradicts the data."""
        beside = beside_path(self.options, run, {"num_virtual_tokens": None})
        return [*_problems(run, self.virtual_tokens), *beside]

    @hookimpl
    def collie_adapter(self, run: Run) -> Adapter:
        """The adapter of this run."""
        from collie_methods.lora.prompts import PromptAdapter

        return PromptAdapter(self.options, run)


class PromptTuningPlugin(_VirtualPlugin):
    """Prompt tuning: trained vectors before every record (Lester et al. 2021, arXiv 2104.08691)."""

    default_lr_factor = 100.0  # vectors of few tokens: peft's examples take 1e-3 to 3e-2 with AdamW
    Options = PromptTuningOptions

    @hookimpl
    def collie_check(self, run: Run) -> list[str]:
        """Options that contradict each other, the data or the layout."""
        options, found = self.options, super().collie_check(run)
        if (options.prompt_tuning_init == "text") != (options.prompt_tuning_init_text is not None):
            found.append("prompt_tuning_init: text needs prompt_tuning_init_text, and no other does")
        if options.prompt_tuning_init != "random" and options.path is None:
            why = "its first vectors are the model's, which are cut"
            found += deepspeed_zero3(run, "prompt_tuning with", why)
        return found


class PTuningPlugin(_VirtualPlugin):
    """P-tuning: vectors before every record, from a trained encoder (Liu et al. 2021, arXiv 2103.10385)."""

    default_lr_factor = 10.0
    Options = PTuningOptions


class PrefixTuningPlugin(_VirtualPlugin):
    """Prefix tuning: keys and values before every record (Li and Liang 2021, arXiv 2101.00190)."""

    default_lr_factor = 100.0
    Options = PrefixTuningOptions

    @hookimpl
    def collie_check(self, run: Run) -> list[str]:
        """What contradicts the data or the layout."""
        why = "it is used where DeepSpeed has not gathered it"
        return super().collie_check(run) + deepspeed_zero3(run, "prefix_tuning with", why)

    @hookimpl
    def collie_adapter(self, run: Run) -> Adapter:
        """The adapter of this run."""
        from collie_methods.lora.prefix import PrefixAdapter

        return PrefixAdapter(self.options, run)


def _virtual_tokens(options: VirtualOptions) -> int:
    """Their number; that of the folder of `path`, whose other contents are checked when it is loaded."""
    saved = saved_config(options.path).get("num_virtual_tokens")
    return saved if isinstance(saved, int) else options.num_virtual_tokens


def _problems(run: Run, count: int) -> Iterator[str]:
    yield from same_names(run)
    if count + 2 > run.config.data.max_length:
        yield (
            f"num_virtual_tokens: {count} of data.max_length {run.config.data.max_length} leave no room "
            "for a record"
        )
    kinds = [section.name.rpartition(":")[2] for section in run.config.adapters]
    virtual = [kind for kind in kinds if kind in ("prompt_tuning", "p_tuning", "prefix_tuning")]
    if len(virtual) > 1:
        yield f"{' and '.join(virtual)}: one adapter alone can put virtual tokens before a record"
