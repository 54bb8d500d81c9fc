"""Mistral's config and tokenizer; all else is LLaMA's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from collie_models.decoder.config import DecoderConfig
from collie_models.decoder.config_reader import ConfigReader
from collie_models.decoder.llama_config import LLAMA_KEYS, LLAMA_ONLY, read_llama_config
from collie_models.decoder.model import Decoder
from collie_models.decoder.provider import LlamaLikeProvider

#: What transformers takes where a config leaves it out; null means no window, and as many heads.
_DEFAULTS: Mapping[str, Any] = {"num_key_value_heads": 8, "sliding_window": 4096}


class MistralForCausalLM(Decoder):
    """A Mistral.  `from_pretrained` reads a folder or hub repository in Hugging Face layout."""


class MistralProvider(LlamaLikeProvider):
    """What the engine knows of Mistral (Jiang et al. 2023, arXiv 2310.06825)."""

    model_class = MistralForCausalLM

    def read_config(self, hf_config: Mapping[str, Any]) -> DecoderConfig:
        """LLaMA's keys and `sliding_window`: positions that a query sees, itself included."""
        ConfigReader(hf_config).refuse_unknown([*LLAMA_KEYS, "sliding_window"], LLAMA_ONLY)
        content = {**_DEFAULTS, **hf_config}
        config = read_llama_config(content, max_positions=131072)
        window = None
        if content["sliding_window"] is not None:
            window = ConfigReader(content).integer("sliding_window")
        return replace(config, window=window)

    def tokenizer(self, path: Path) -> Any:
        """The tokenizer of a folder: tokenizer.json, or sentencepiece's tokenizer.model where that is all."""
        from collie_models.decoder.llama_tokenizer import load_tokenizer, read_tokenizer_json

        if (path / "tokenizer.json").is_file():
            return read_tokenizer_json(path)
        return load_tokenizer(path)
