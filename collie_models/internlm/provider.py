"""InternLM's and InternLM2's configs, weight maps, tokenizers, and their relative: LLaMA with biases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from collie_core.plugin import ConfigError, Ignore, Relative, Rename, Split, WeightRule
from collie_models.decoder.config import DecoderConfig
from collie_models.decoder.config_reader import ConfigReader
from collie_models.decoder.llama_config import read_llama_config
from collie_models.decoder.llama_names import llama_weight_map
from collie_models.decoder.model import Decoder
from collie_models.decoder.provider import LlamaLikeProvider
from collie_models.decoder.relatives import shared_keys
from collie_models.decoder.rope_scaling import Dynamic
from collie_models.decoder.rotary import Rotary

_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("tie_word_embeddings", "bias", "rope_theta", "rope_scaling"),
)
_DEFAULTS: Mapping[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "eos_token_id": 2,
}
_ROTARY_TYPES = {"origin": None, "dynamic": "dynamic"}


class InternLMForCausalLM(Decoder):
    """An InternLM.  `from_pretrained` reads a folder or hub repository in Hugging Face layout."""


class InternLM2ForCausalLM(Decoder):
    """An InternLM2.  `from_pretrained` reads a folder or hub repository in Hugging Face layout."""


class InternLMProvider(LlamaLikeProvider):
    """What the engine knows of InternLM: LLaMA's names and sums, with biases in the attention."""

    model_class = InternLMForCausalLM

    export_as: Mapping[str, Relative] = {
        "llama": Relative(lambda hf: as_llama(InternLMProvider().read_config(hf), hf), llama_weight_map)
    }

    def read_config(self, hf_config: Mapping[str, Any]) -> DecoderConfig:
        """`bias` (true where absent) is that of q, k, v and o.  `rotary` {base, type, scaling_factor} spells
        rope_theta and rope_scaling as the code of 2023 did.  Raises ConfigError for an unknown key.
        """
        ConfigReader(hf_config).refuse_unknown([*_KEYS, "rotary"], {})
        content = {"vocab_size": 103168, "pad_token_id": 0, **_DEFAULTS, **hf_config, **_rotary(hf_config)}
        heads, kv_heads = content["num_attention_heads"], content.get("num_key_value_heads")
        if kv_heads not in (None, heads):
            raise ConfigError(
                f"num_key_value_heads: {kv_heads!r} is not supported: InternLM has as many as "
                f"num_attention_heads ({heads})"
            )
        config = _with_bias(content)
        dynamic = isinstance(config.rotary, Rotary) and isinstance(config.rotary.scaling, Dynamic)
        return replace(config, late_rotation=dynamic)

    def tokenizer(self, path: Path) -> Any:
        """The tokenizer in a folder; see `collie_models.internlm.tokenizer`."""
        from collie_models.internlm.tokenizer import load_tokenizer

        return load_tokenizer(path)


class InternLM2Provider(LlamaLikeProvider):
    """What the engine knows of InternLM2: LLaMA's sums, with q, k and v in one matrix, group by group."""

    model_class = InternLM2ForCausalLM

    export_as: Mapping[str, Relative] = {
        "llama": Relative(lambda hf: as_llama(InternLM2Provider().read_config(hf), hf), llama_weight_map)
    }

    def read_config(self, hf_config: Mapping[str, Any]) -> DecoderConfig:
        """`bias` (true where absent) is that of wqkv and wo.  Raises ConfigError for an unknown key."""
        ConfigReader(hf_config).refuse_unknown(_KEYS, {})
        return _with_bias({"vocab_size": 103168, "pad_token_id": 0, **_DEFAULTS, **hf_config})

    def weight_map(self, config: DecoderConfig) -> Sequence[WeightRule]:
        """wqkv holds, for each group, its query heads, its key head and its value head."""
        return list(_internlm2_rules(config))

    def tokenizer(self, path: Path) -> Any:
        """The tokenizer in a folder; see `collie_models.internlm.tokenizer`."""
        from collie_models.internlm.tokenizer import load_tokenizer2

        return load_tokenizer2(path)


def _internlm2_rules(config: DecoderConfig) -> Iterator[WeightRule]:
    width, groups = config.head_dim, config.num_kv_heads
    sizes = (config.num_heads // groups * width, width, width)
    yield Rename("model.tok_embeddings.weight", "embed.tokens.weight")
    for index in range(config.num_layers):
        source, target = f"model.layers.{index}", f"blocks.{index}"
        for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
            parts = tuple(f"{target}.attention.{name}_proj.{kind}" for name in "qkv")
            yield Split(f"{source}.attention.wqkv.{kind}", parts, sizes, groups)
            yield Rename(f"{source}.attention.wo.{kind}", f"{target}.attention.o_proj.{kind}")
        yield Rename(f"{source}.attention_norm.weight", f"{target}.attention_norm.weight")
        yield Rename(f"{source}.ffn_norm.weight", f"{target}.mlp_norm.weight")
        for theirs, ours in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
            yield Rename(f"{source}.feed_forward.{theirs}.weight", f"{target}.mlp.{ours}.weight")
    yield Rename("model.norm.weight", "head.norm.weight")
    yield Rename("output.weight", "head.lm_head.weight")
    yield Ignore("model.layers.*.attention.rotary_emb.inv_freq")


def _rotary(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """rope_theta and rope_scaling for `rotary`, where there is one."""
    stated = hf_config.get("rotary")
    if stated is None:
        return {}
    if not isinstance(stated, Mapping):
        raise ConfigReader(hf_config).wrong("rotary", "a mapping")
    rotary = ConfigReader(stated, "rotary.")
    rotary.refuse_others(["base", "type", "scaling_factor"])
    for key in ("rope_theta", "rope_scaling"):
        if hf_config.get(key) is not None:
            raise ConfigError(f"rotary and {key} are both given; one of them is meant")
    kind = rotary.choice("type", _ROTARY_TYPES, "dynamic")
    scaling = {"type": kind, "factor": rotary.number("scaling_factor", 1.0)} if kind else None
    return {"rope_theta": rotary.number("base", 10000.0), "rope_scaling": scaling}


def _with_bias(content: Mapping[str, Any]) -> DecoderConfig:
    bias = ConfigReader(content).flag("bias", True)
    return replace(read_llama_config(content), qkv_bias=bias, attention_output_bias=bias)


def as_llama(config: DecoderConfig, hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' LlamaConfig; `attention_bias` is that of q, k, v and o."""
    made = shared_keys("llama", "LlamaForCausalLM", config, hf_config) | {
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu" if config.activation == "silu" else hf_config["hidden_act"],
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.qkv_bias,
        "mlp_bias": False,
        "max_position_embeddings": hf_config.get("max_position_embeddings") or 2048,
    }
    stated = {**hf_config, **_rotary(hf_config)}
    scaling = stated.get("rope_scaling")
    if scaling:
        kind = scaling.get("rope_type") or scaling.get("type")
        scaling = {**scaling, "type": kind, "rope_type": kind}
    return made | {"rope_theta": float(stated.get("rope_theta") or 10000.0), "rope_scaling": scaling}
