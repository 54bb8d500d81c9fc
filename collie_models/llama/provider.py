"""LLaMA's config, weight map, parallel plan and tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collie_core.plugin import ParallelPlan, Relative, WeightRule
from collie_models.decoder.config import DecoderConfig
from collie_models.decoder.llama_config import read_llama_config
from collie_models.decoder.llama_names import llama_weight_map
from collie_models.decoder.model import Decoder
from collie_models.decoder.plan import decoder_parallel_plan

if TYPE_CHECKING:
    from collie_core.ops import Ops


class LlamaForCausalLM(Decoder):
    """A LLaMA.  `from_pretrained` reads a folder or hub repository in Hugging Face layout."""


class LlamaProvider:
    """What the engine knows of LLaMA."""

    template: str | None = None
    export_as: Mapping[str, Relative] = {"llama": Relative(dict, llama_weight_map)}  # it is what it is

    def read_config(self, hf_config: Mapping[str, Any]) -> DecoderConfig:
        """Both spellings of transformers (4: rope_theta, rope_scaling; 5: rope_parameters).

        `pretraining_tp`, which only orders sums, and keys unknown to transformers' LLaMA have no effect.
        """
        return read_llama_config(hf_config)

    def build(self, config: DecoderConfig, ops: Ops) -> LlamaForCausalLM:
        """The module; see `ModelProvider.build`."""
        return LlamaForCausalLM(config, ops)

    def weight_map(self, config: DecoderConfig) -> Sequence[WeightRule]:
        """The names of Hugging Face checkpoints."""
        return llama_weight_map(config)

    def parallel_plan(self, config: DecoderConfig) -> ParallelPlan:
        """Attention by heads, MLP by its inner width, embedding and head by vocabulary."""
        return decoder_parallel_plan(config)

    def tokenizer(self, path: Path) -> Any:
        """The tokenizer in a folder; see `collie_models.decoder.llama_tokenizer`."""
        from collie_models.decoder.llama_tokenizer import load_tokenizer

        return load_tokenizer(path)
