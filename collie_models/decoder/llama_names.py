"""The names of LLaMA's tensors in checkpoints, which several families and their relatives share."""

from __future__ import annotations

from collections.abc import Iterator

from collie_core.plugin import Ignore, Rename, WeightRule
from collie_models.decoder.config import DecoderConfig

_QK_NORM = {
    "self_attn.q_norm.weight": "attention.q_norm.weight",
    "self_attn.k_norm.weight": "attention.k_norm.weight",
}
_LAYER = {
    "input_layernorm.weight": "attention_norm.weight",
    "self_attn.q_proj": "attention.q_proj",
    "self_attn.k_proj": "attention.k_proj",
    "self_attn.v_proj": "attention.v_proj",
    "self_attn.o_proj": "attention.o_proj",
    "post_attention_layernorm.weight": "mlp_norm.weight",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.up_proj",
    "mlp.down_proj": "mlp.down_proj",
}


def llama_weight_map(config: DecoderConfig) -> list[WeightRule]:
    """`model.layers.N.self_attn.q_proj.weight` and so on, for a sequential decoder with RMSNorm."""
    rules: list[WeightRule] = [Rename("model.embed_tokens.weight", "embed.tokens.weight")]
    for index in range(config.num_layers):
        for source, target in (_LAYER | (_QK_NORM if config.qk_norm else {})).items():
            for suffix in _suffixes(source, config):
                rules.append(
                    Rename(f"model.layers.{index}.{source}{suffix}", f"blocks.{index}.{target}{suffix}")
                )
    rules.append(Rename("model.norm.weight", "head.norm.weight"))
    rules.append(Rename("lm_head.weight", "head.lm_head.weight"))
    rules.append(Ignore("model.layers.*.self_attn.rotary_emb.inv_freq"))  # early checkpoints; computed anew
    return rules


def _suffixes(source: str, config: DecoderConfig) -> Iterator[str]:
    if source.endswith(".weight"):
        yield ""
        return
    yield ".weight"
    bias = {
        "mlp": config.mlp_bias,
        "self_attn": config.attention_output_bias if source == "self_attn.o_proj" else config.qkv_bias,
    }
    if bias[source.partition(".")[0]]:
        yield ".bias"
