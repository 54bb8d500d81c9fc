"""Qwen2's and Qwen3's configs and tokenizer; all else is LLaMA's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from collie_core.plugin import ConfigError
from collie_models.decoder.config import DecoderConfig
from collie_models.decoder.config_reader import ConfigReader
from collie_models.decoder.llama_config import LLAMA_KEYS, LLAMA_ONLY, read_llama_config
from collie_models.decoder.model import Decoder
from collie_models.decoder.provider import LlamaLikeProvider

#: Without `use_sliding_window` the window has no effect, though most configs state one.
_KEYS = (*LLAMA_KEYS, "use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
#: What transformers takes where a config leaves it out.
_DEFAULTS: Mapping[str, Any] = {"num_key_value_heads": 32}
_MAX_POSITIONS = 32768


class Qwen2ForCausalLM(Decoder):
    """A Qwen2 or Qwen2.5.  `from_pretrained` reads a folder or hub repository in Hugging Face layout."""


class Qwen3ForCausalLM(Decoder):
    """A dense Qwen3.  `from_pretrained` reads a folder or hub repository in Hugging Face layout."""


class Qwen2Provider(LlamaLikeProvider):
    """Queries, keys and values have a bias, the output of attention has none."""

    model_class: type[Decoder] = Qwen2ForCausalLM

    def read_config(self, hf_config: Mapping[str, Any]) -> DecoderConfig:
        """Raises ConfigError for layers with a sliding window, which the model plugin `hf` has."""
        _refuse(hf_config)
        config = read_llama_config({**_DEFAULTS, **hf_config}, _MAX_POSITIONS)
        return replace(config, qkv_bias=True, attention_output_bias=False)

    def tokenizer(self, path: Path) -> Any:
        """The tokenizer of the folder's tokenizer.json."""
        from collie_models.decoder.llama_tokenizer import read_tokenizer_json

        return read_tokenizer_json(path)


class Qwen3Provider(Qwen2Provider):
    """Queries and keys are normalised a head; a head's width is stated, 128 if it is not."""

    model_class = Qwen3ForCausalLM

    def read_config(self, hf_config: Mapping[str, Any]) -> DecoderConfig:
        """Raises ConfigError for layers with a sliding window, which the model plugin `hf` has."""
        _refuse(hf_config)
        config = read_llama_config({**_DEFAULTS, **hf_config}, _MAX_POSITIONS, head_dim=128)
        return replace(config, qk_norm=True)


def _refuse(hf_config: Mapping[str, Any]) -> None:
    """Unknown keys, and sliding windows in some of the layers."""
    ConfigReader(hf_config).refuse_unknown(_KEYS, LLAMA_ONLY)
    layers = hf_config.get("num_hidden_layers")
    from_layer = hf_config.get("max_window_layers", 28)
    windowed = ConfigReader(hf_config).flag("use_sliding_window", False)
    types = hf_config.get("layer_types")
    if isinstance(types, list):
        windowed = windowed and "sliding_attention" in types
    elif isinstance(layers, int) and isinstance(from_layer, int):
        windowed = windowed and layers > from_layer
    if windowed and hf_config.get("sliding_window", 4096) is not None:
        raise ConfigError("use_sliding_window: true is not supported by this plugin; use model.provider: hf")
