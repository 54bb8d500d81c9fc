"""LLaMA's `config.json`, whose keys many families share."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

from collie_core.plugin import ConfigError
from collie_models.decoder.config import DecoderConfig
from collie_models.decoder.config_reader import ConfigReader
from collie_models.decoder.rope_config import read_rotary

_log = logging.getLogger(__name__)

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}

LLAMA_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range"),
    *("rms_norm_eps", "tie_word_embeddings", "attention_bias", "mlp_bias", "rope_theta", "rope_scaling"),
    *("rope_parameters", "original_max_position_embeddings"),
)
#: Keys of LLaMA's descendants that would change the result, with the values that change nothing.
LLAMA_ONLY: Mapping[str, tuple[Any, ...]] = {
    "activation": ("swiglu",),  # Falcon 3's word for a gated MLP with silu
    "attention_multiplier": (),
    "embedding_multiplier": (1,),
    "logits_scaling": (1,),
    "residual_multiplier": (1,),
}


def read_llama_config(
    hf_config: Mapping[str, Any],
    max_positions: int = 2048,
    head_dim: int | None = None,
) -> DecoderConfig:
    """The decoder that a config in LLaMA's terms describes, in both spellings of transformers (4: rope_theta,
    rope_scaling; 5: rope_parameters).

    max_positions: of a config that does not state it.  head_dim: the same; None: hidden_size /
    num_attention_heads.  Raises ConfigError for wrong values; `refuse_unknown` is the family's to call.
    """
    config = ConfigReader(hf_config)
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    if head_dim is None and hf_config.get("head_dim") is None and hidden % heads:
        raise ConfigError(f"hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    kv_heads = config.integer("num_key_value_heads", heads)
    width = config.integer("head_dim", head_dim or hidden // heads)
    if heads % kv_heads:
        raise ConfigError(f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    if width % 2:
        raise ConfigError(f"head_dim {width} is odd; rotary positions need pairs of channels")
    attention_bias = config.flag("attention_bias", False)
    eos, pad = special_ids(hf_config)
    return DecoderConfig(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=config.integer("intermediate_size"),
        num_layers=config.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width,
        rotary=read_rotary(config, width, config.integer("max_position_embeddings", max_positions)),
        norm_eps=config.number("rms_norm_eps", 1e-6),
        activation=config.choice("hidden_act", ACTIVATIONS, "silu"),
        qkv_bias=attention_bias,
        attention_output_bias=attention_bias,
        mlp_bias=config.flag("mlp_bias", False),
        tie_embeddings=config.flag("tie_word_embeddings", False),
        initializer_range=config.number("initializer_range", 0.02),
        eos_token_id=eos,
        pad_token_id=pad,
    )


def special_ids(hf_config: Mapping[str, Any]) -> tuple[int | tuple[int, ...] | None, int | None]:
    """End-of-sequence and padding ids; early conversions have bos 0, eos 1 and pad -1, which are wrong."""
    bos, eos, pad = (hf_config.get(f"{name}_token_id") for name in ("bos", "eos", "pad"))
    if (bos, eos) == (0, 1):
        _log.warning(
            "config.json: bos_token_id 0 and eos_token_id 1 are those of an early conversion; 2 ends texts"
        )
        eos = 2
    if isinstance(pad, int) and pad < 0:
        _log.warning("config.json: pad_token_id %d is no token; there is no padding token", pad)
        pad = None
    return tuple(eos) if isinstance(eos, list) else eos, pad
