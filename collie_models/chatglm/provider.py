"""Which of the two architectures a `chatglm` is; ChatGLM2's and 3's config, weight map and relative, Glm."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collie_core.plugin import ConfigError, Ignore, Relative, Rename, Split, WeightRule
from collie_models.chatglm.provider_v1 import ChatGLMProvider
from collie_models.decoder.config import DecoderConfig
from collie_models.decoder.config_reader import ConfigReader
from collie_models.decoder.llama_names import llama_weight_map
from collie_models.decoder.model import Decoder
from collie_models.decoder.provider import DecoderProvider
from collie_models.decoder.relatives import shared_keys
from collie_models.decoder.rope_scaling import Linear, Unscaled
from collie_models.decoder.rotary import Rotary

if TYPE_CHECKING:
    from collie_core.hookspecs import ModelProvider

_log = logging.getLogger(__name__)

_KEYS_OF_1 = ("inner_hidden_size", "position_encoding_2d", "gmask_token_id", "max_sequence_length")
_KEYS_OF_2 = ("multi_query_attention", "padded_vocab_size", "ffn_hidden_size", "kv_channels", "rmsnorm")

_KEYS = (
    *("num_layers", "padded_vocab_size", "vocab_size", "hidden_size", "ffn_hidden_size", "kv_channels"),
    *("num_attention_heads", "seq_length", "layernorm_epsilon", "rmsnorm", "post_layer_norm"),
    *("apply_residual_connection_post_layernorm", "add_bias_linear", "add_qkv_bias"),
    *("multi_query_attention", "multi_query_group_num", "rope_ratio", "tie_word_embeddings"),
    *("initializer_range", "num_hidden_layers"),
    # how the original computes the same
    *("apply_query_key_layer_scaling", "attention_softmax_in_fp32", "bias_dropout_fusion", "original_rope"),
    *("classifier_dropout", "num_image_tokens"),
)
#: key -> the values that are computed here
_ONLY = {
    "fp32_residual_connection": (False,),
    "pre_seq_len": (0,),
    "prefix_projection": (False,),
    "quantization_bit": (0,),
    "interleaved_qkv": (False,),
    "rotary_percent": (0.5,),
}


def provider_for(hf_config: Mapping[str, Any]) -> ModelProvider:
    """The provider of ChatGLM-6B or of ChatGLM2-6B.  Raises ConfigError where the keys are of neither."""
    first, second = (
        [key for key in keys if hf_config.get(key) is not None] for keys in (_KEYS_OF_1, _KEYS_OF_2)
    )
    if first and not second:
        return ChatGLMProvider()
    if second and not first:
        return ChatGLM2Provider()
    found = f"has {first[0]} and {second[0]}" if first else "has none of these"
    raise ConfigError(
        "config.json: model_type 'chatglm' is shared by two architectures, ChatGLM-6B (its keys: "
        f"{', '.join(_KEYS_OF_1)}) and ChatGLM2-6B or ChatGLM3-6B ({', '.join(_KEYS_OF_2)}); "
        f"this config {found}"
    )


@dataclass(frozen=True)
class ChatGLM2Config(DecoderConfig):
    """A decoder's options, and whether query_key_value is in the order of heads (no multi-query)."""

    qkv_by_head: bool = False


class ChatGLM2ForCausalLM(Decoder):
    """A ChatGLM2 or 3.  `from_pretrained` reads a folder or hub repository in Hugging Face layout."""


class ChatGLM2Provider(DecoderProvider):
    """What the engine knows of ChatGLM2-6B and ChatGLM3-6B (https://github.com/THUDM/ChatGLM2-6B)."""

    model_class = ChatGLM2ForCausalLM
    export_as: Mapping[str, Relative] = {  # where the options are those of the released models
        "glm": Relative(
            lambda hf: as_glm(ChatGLM2Provider().read_config(hf), hf), lambda config: glm_weight_map(config)
        )
    }

    def read_config(self, hf_config: Mapping[str, Any]) -> ChatGLM2Config:
        """Every option of the original that changes a result.  Raises ConfigError for an unknown key."""
        config = ConfigReader(hf_config, "ChatGLM2: ")
        config.refuse_unknown(_KEYS, _ONLY)
        heads, width = config.integer("num_attention_heads", 32), config.integer("kv_channels", 128)
        grouped = config.flag("multi_query_attention", False)
        groups = config.integer("multi_query_group_num", 1) if grouped else heads
        if heads % groups:
            raise ConfigError(
                f"ChatGLM2: num_attention_heads {heads} is no multiple of multi_query_group_num {groups}"
            )
        if width % 4:
            raise ConfigError(
                f"ChatGLM2: kv_channels {width} is no multiple of 4, as its rotary positions need"
            )
        if config.flag("tie_word_embeddings", False):
            _log.warning("config.json: tie_word_embeddings has no effect: ChatGLM2's matrices are never tied")
        normed = config.flag("apply_residual_connection_post_layernorm", False)
        bias = config.flag("add_bias_linear", False)
        return ChatGLM2Config(
            qkv_by_head=not grouped,
            vocab_size=_vocabulary(config),
            hidden_size=config.integer("hidden_size", 4096),
            intermediate_size=config.integer("ffn_hidden_size", 13696),
            num_layers=config.integer("num_layers", 28),
            num_heads=heads,
            num_kv_heads=groups,
            head_dim=width,
            rotary=_rotary(config, width // 2),
            norm="rms" if config.flag("rmsnorm", True) else "layer",
            norm_eps=config.number("layernorm_epsilon", 1e-5),
            qkv_bias=bias or config.flag("add_qkv_bias", False),
            attention_output_bias=bias,
            mlp_bias=bias,
            residual="normed" if normed else "sequential",
            final_norm=config.flag("post_layer_norm", True),
            max_positions=config.integer("seq_length", 2048),
            initializer_range=config.number("initializer_range", 0.02),
            eos_token_id=config.tokens("eos_token_id", 2),
            pad_token_id=config.token("pad_token_id", 0),
        )

    def weight_map(self, config: ChatGLM2Config) -> Sequence[WeightRule]:
        """query_key_value holds queries, then keys, then values; without multi-query, those of each head."""
        return list(_rules(config))

    def tokenizer(self, path: Path) -> Any:
        """The tokenizer in a folder; see `collie_models.chatglm.tokenizer_v2`."""
        from collie_models.chatglm.tokenizer_v2 import load_tokenizer2

        return load_tokenizer2(path)


def _vocabulary(config: ConfigReader) -> int:
    size = config.integer("padded_vocab_size", config.integer("vocab_size", 65024))
    if config.integer("vocab_size", size) != size:
        raise config.wrong("vocab_size", f"that of padded_vocab_size ({size})")
    return size


def _rotary(config: ConfigReader, dim: int) -> Rotary:
    """rope_ratio multiplies the base; in chatglm2-6b-32k, whose code is older, it divides the positions."""
    ratio = config.number("rope_ratio", 1.0)
    if "chatglm2" in str(config.content.get("_name_or_path")).lower():
        return Rotary(dim, interleaved=True, scaling=Unscaled() if ratio == 1.0 else Linear(ratio))
    return Rotary(dim, 10000.0 * ratio, interleaved=True)


def _rules(config: ChatGLM2Config) -> Iterator[WeightRule]:
    d, f = config.head_dim, config.intermediate_size
    heads, groups = config.num_heads, config.num_kv_heads
    sizes, blocks = ((d, d, d), heads) if config.qkv_by_head else ((heads * d, groups * d, groups * d), 1)
    norms = ("weight",) if config.norm == "rms" else ("weight", "bias")
    linears = ("weight", "bias") if config.mlp_bias else ("weight",)
    yield Rename("transformer.embedding.word_embeddings.weight", "embed.tokens.weight")
    for index in range(config.num_layers):
        source, target = f"transformer.encoder.layers.{index}", f"blocks.{index}"
        for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
            parts = tuple(f"{target}.attention.{name}_proj.{kind}" for name in "qkv")
            yield Split(f"{source}.self_attention.query_key_value.{kind}", parts, sizes, blocks)
        for kind in norms:
            yield Rename(f"{source}.input_layernorm.{kind}", f"{target}.attention_norm.{kind}")
            yield Rename(f"{source}.post_attention_layernorm.{kind}", f"{target}.mlp_norm.{kind}")
        for kind in linears:
            yield Rename(f"{source}.self_attention.dense.{kind}", f"{target}.attention.o_proj.{kind}")
            parts = (f"{target}.mlp.gate_proj.{kind}", f"{target}.mlp.up_proj.{kind}")
            yield Split(f"{source}.mlp.dense_h_to_4h.{kind}", parts, (f, f))
            yield Rename(f"{source}.mlp.dense_4h_to_h.{kind}", f"{target}.mlp.down_proj.{kind}")
    if config.final_norm:
        for kind in norms:
            yield Rename(f"transformer.encoder.final_layernorm.{kind}", f"head.norm.{kind}")
    yield Rename("transformer.output_layer.weight", "head.lm_head.weight")
    yield Ignore("transformer.rotary_pos_emb.inv_freq")


def as_glm(config: DecoderConfig, hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' GlmConfig.  Raises ConfigError for the options that it does not have."""
    for key, expected, found in (
        ("rmsnorm", True, config.norm == "rms"),
        ("add_bias_linear", False, config.mlp_bias),
        ("apply_residual_connection_post_layernorm", False, config.residual == "normed"),
        ("post_layer_norm", True, config.final_norm),
    ):
        if found != expected:
            raise ConfigError(f"{key}: {str(found).lower()} has no place in transformers' Glm")
    rotary = config.rotary
    assert isinstance(rotary, Rotary)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": rotary.theta, "partial_rotary_factor": 0.5}
    if isinstance(rotary.scaling, Linear):
        rope |= {"rope_type": "linear", "factor": rotary.scaling.factor}
    return shared_keys("glm", "GlmForCausalLM", config, hf_config) | {
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.qkv_bias,
        "attention_dropout": 0.0,
        "max_position_embeddings": config.max_positions,
        "partial_rotary_factor": 0.5,
        "rope_theta": rotary.theta,
        "rope_parameters": rope,
    }


def glm_weight_map(config: DecoderConfig) -> list[WeightRule]:
    """The names of transformers' Glm: LLaMA's, but for gate and up in one matrix."""
    fused = (".mlp.gate_proj.weight", ".mlp.up_proj.weight")
    rules = [rule for rule in llama_weight_map(config) if not any(n.endswith(fused) for n in rule.targets)]
    size = config.intermediate_size
    for index in range(config.num_layers):
        mlp = f"blocks.{index}.mlp"
        parts = (f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight")
        rules.append(Split(f"model.layers.{index}.mlp.gate_up_proj.weight", parts, (size, size)))
    return rules
