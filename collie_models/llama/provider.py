"""LLaMA's config and tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from collie_core.plugin import Relative
from collie_models.decoder.config import DecoderConfig
from collie_models.decoder.config_reader import ConfigReader
from collie_models.decoder.llama_config import LLAMA_KEYS, LLAMA_ONLY, read_llama_config
from collie_models.decoder.llama_names import llama_weight_map
from collie_models.decoder.model import Decoder
from collie_models.decoder.provider import LlamaLikeProvider


class LlamaForCausalLM(Decoder):
    """A LLaMA.  `from_pretrained` reads a folder or hub repository in Hugging Face layout."""


class LlamaProvider(LlamaLikeProvider):
    """What the engine knows of LLaMA."""

    model_class = LlamaForCausalLM
    export_as: Mapping[str, Relative] = {"llama": Relative(dict, llama_weight_map)}  # it is what it is

    def read_config(self, hf_config: Mapping[str, Any]) -> DecoderConfig:
        """Both spellings of transformers (4: rope_theta, rope_scaling; 5: rope_parameters).

        Raises ConfigError for an unknown key.
        """
        ConfigReader(hf_config).refuse_unknown(LLAMA_KEYS, LLAMA_ONLY)
        return read_llama_config(hf_config)

    def tokenizer(self, path: Path) -> Any:
        """The tokenizer in a folder; see `collie_models.decoder.llama_tokenizer`."""
        from collie_models.decoder.llama_tokenizer import load_tokenizer

        return load_tokenizer(path)
