"""The config of a model of transformers, and what is refused by a look at it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from collie_core.plugin import ConfigError, nearest
from collie_models.decoder.config_reader import ConfigReader

#: Keys that say that there are experts, whose routing has a loss of its own.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "router_aux_loss_coef")
#: Rotary types that depend on the longest record of a batch: packed and single records would differ.
_DEPENDENT_ROPE = ("dynamic", "longrope")


def read_config(hf_config: Mapping[str, Any]) -> PreTrainedConfig:
    """The library's config object.  Raises ConfigError for what the library or this plugin cannot do."""
    content = {key: value for key, value in hf_config.items() if key not in ("auto_map", "architectures")}
    name = content.get("model_type")
    if not isinstance(name, str) or name not in CONFIG_MAPPING:
        known = sorted(CONFIG_MAPPING.keys())
        raise ConfigError(
            f"model_type {name!r} is not implemented by transformers{nearest(str(name), known)} "
            "(auto_map and the code of a checkpoint are never run)"
        )
    kind = CONFIG_MAPPING[name]
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(f"model_type {name!r} is no causal language model of transformers")
    _refuse(name, content)
    try:
        config = kind.from_dict(content)
    except Exception as error:  # the library validates with exceptions of several kinds
        reason = " ".join(str(error).split())
        raise ConfigError(f"transformers' {kind.__name__} refuses it: {reason}") from None
    _refuse_config(name, config)
    default = kind()
    activations = tuple(getattr(config, key) for key in _ACTIVATIONS if hasattr(default, key))
    only = {**_ONLY, **dict.fromkeys(_ACTIVATIONS, activations)}
    ConfigReader(content).refuse_unknown(_known(default, content), only)
    return config


def _refuse(name: str, content: Mapping[str, Any]) -> None:
    """Refuse what the mapping states."""
    if content.get("quantization_config") is not None:
        raise ConfigError("quantization_config: quantised weights are not supported")
    for key in ("use_bidirectional_attention", "add_cross_attention", "is_encoder_decoder", "alibi"):
        if content.get(key):
            raise ConfigError(f"{key}: {content[key]!r} is not supported")


def _refuse_config(name: str, config: PreTrainedConfig) -> None:
    """Refuse what the library's own defaults add."""
    if config.is_encoder_decoder:
        raise ConfigError(f"model_type {name!r} has an encoder and a decoder, which is not supported")
    if config.get_text_config() is not config:
        raise ConfigError(f"model_type {name!r} has parts for other things than text, which is not supported")
    for key in _EXPERTS:
        if getattr(config, key, None):
            raise ConfigError(f"{key}: {getattr(config, key)!r}: mixtures of experts are not supported")
    if getattr(config, "layerdrop", 0):
        raise ConfigError(f"layerdrop: {config.layerdrop!r} is not supported, set it to 0")
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    for parameters in nested or [rope]:
        if parameters.get("rope_type") in _DEPENDENT_ROPE:
            raise ConfigError(
                f"rope_type {parameters['rope_type']!r} is not supported: the library "
                "computes it from the longest record of a batch"
            )


def _known(default: PreTrainedConfig, content: Mapping[str, Any]) -> list[str]:
    """The keys that the library reads into its config, those of older versions included."""
    known = [key for key in content if hasattr(default, key) or key in default.attribute_map]
    rope = [key for key in _ROPE if hasattr(default, "rope_parameters")]
    return [*known, *default.to_dict(), *rope, *_OLDER.get(default.model_type, ())]


#: How older versions spelt the entries of rope_parameters, which the library still reads.
_ROPE = ("rope_theta", "rope_scaling", "partial_rotary_factor")
#: Of these a class knows one, and checkpoints may state it under another of the names as well.
_ACTIVATIONS = ("activation_function", "hidden_act", "hidden_activation")
#: model_type -> the same for one family
_OLDER: Mapping[str, tuple[str, ...]] = {
    "falcon": ("n_embed",),
    "gpt_bigcode": (  # of its own inference
        *("inference_runner", "max_batch_size", "pad_key_length", "pre_allocate_kv_cache"),
        "validate_runner_input",
    ),
    "gemma3_text": ("rope_local_base_freq", "sliding_window_pattern"),
    "gpt_neox": ("rotary_emb_base", "rotary_pct"),
}
#: key -> the values with which the library computes the same as if the key were not there.  What the config
#: classes of older versions had, and what checkpoints say of their layers that the library knows anyway.
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "apply_residual_connection_post_layernorm": (False,),
    "full_attn_mod": (1,),
    "interpolate_factor": (1,),
    "lm_head_bias": (False,),
    "mlp_type": ("default",),
    "norm_type": ("layer_norm",),
    "rotary": (True,),
    "scale_attn_weights": (True,),
}
