"""LLaMA's config, weight map, parallel plan and tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collie_core.plugin import ParallelPlan, Relative, WeightRule
from collie_models.decoder.config import DecoderConfig
from collie_models.decoder.llama_config import UNSUPPORTED, read_llama_config
from collie_models.decoder.llama_names import llama_weight_map
from collie_models.decoder.model import Decoder
from collie_models.decoder.plan import decoder_parallel_plan
from collie_models.decoder.transformers_keys import TRANSFORMERS_KEYS

if TYPE_CHECKING:
    from collie_core.ops import Ops


_log = logging.getLogger(__name__)

_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range"),
    *(
        "rms_norm_eps",
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
        "original_max_position_embeddings",
    ),
    *("rope_theta", "rope_scaling", "rope_parameters", "pretraining_tp"),  # the last only orders sums
)


class LlamaForCausalLM(Decoder):
    """A LLaMA.  `from_pretrained` reads a folder or hub repository in Hugging Face layout."""


class LlamaProvider:
    """What the engine knows of LLaMA."""

    template: str | None = None
    export_as: Mapping[str, Relative] = {"llama": Relative(dict, llama_weight_map)}  # it is what it is

    def read_config(self, hf_config: Mapping[str, Any]) -> DecoderConfig:
        """Both spellings of transformers (4: rope_theta, rope_scaling; 5: rope_parameters).

        Keys unknown to transformers' LLaMA have no effect, and a warning names them.
        """
        unknown = [key for key in hf_config if key not in (*_KEYS, *UNSUPPORTED, *TRANSFORMERS_KEYS)]
        if unknown:
            _log.warning("config.json: %s: no keys of LLaMA; they have no effect", ", ".join(unknown))
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
