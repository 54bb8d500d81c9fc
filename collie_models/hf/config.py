"""The config of a model of transformers, and what is refused by a look at it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from collie_core.plugin import ConfigError, nearest

_log = logging.getLogger(__name__)

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
    _warn_of_unknown(kind, content)
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


def _warn_of_unknown(kind: type[PreTrainedConfig], content: Mapping[str, Any]) -> None:
    """Unknown keys may be misspelt; but configs on the hub have many, so none is refused."""
    known = {*kind().to_dict(), *kind.attribute_map, *_OF_OLDER_VERSIONS}
    unknown = sorted(key for key in content if key not in known)
    if unknown:
        _log.warning("config.json: transformers' %s does not know %s", kind.__name__, ", ".join(unknown))


#: Keys that the library reads or wrote in some version, and that its configs do not show.
_OF_OLDER_VERSIONS = frozenset(
    "torch_dtype dtype transformers_version _name_or_path rope_theta rope_scaling tie_word_embeddings "
    "use_cache task_specific_params n_ctx summary_type summary_use_proj summary_activation "
    "summary_first_dropout summary_proj_to_labels sliding_window_pattern _attn_implementation "
    "cache_implementation hidden_act max_window_layers partial_rotary_factor rope_local_base_freq "
    "bos_token_id eos_token_id pad_token_id decoder_start_token_id sep_token_id prefix torchscript".split()
)
