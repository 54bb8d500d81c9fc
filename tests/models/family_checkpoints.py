"""Random tiny checkpoints in each family's original layout, made from transformers' relatives by hand.

The relatives are the oracles: nothing here uses our weight maps.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    CodeGenConfig,
    CodeGenForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

VOCAB = 96


@dataclass(frozen=True)
class Family:
    """config and variants: original keys.  stock: the relative for a config.  tensors: the original layout
    of the relative's tensors."""

    config: Mapping[str, Any]
    variants: Mapping[str, Mapping[str, Any]]
    stock: Callable[[Mapping[str, Any]], Any]
    tensors: Callable[[Mapping[str, Tensor], Mapping[str, Any]], dict[str, Tensor]]
    relative: str

    def write(self, folder: Path, variant: str, dtype: torch.dtype = torch.float32) -> Any:
        """A checkpoint in `folder`; returns the relative with the same weights, in fp32."""
        config = {**self.config, **self.variants[variant]}
        torch.manual_seed(0)
        stock = self.stock(config).eval()
        with torch.no_grad():
            for parameter in stock.parameters():
                parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.1))
                parameter.copy_(parameter.to(dtype))
        content = {name: tensor.detach().to(dtype) for name, tensor in stock.state_dict().items()}
        write_checkpoint(folder, config, self.tensors(content, config))
        return stock


def write_checkpoint(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """config.json and one file of tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "model.safetensors"
    )


def golden_folder(family: str, folder: Path) -> Path:
    """The golden checkpoint of a family with the golden tokenizer; MOSS's with room for its long prompt."""
    cases = Path(__file__).parents[1] / "golden" / "cases"
    shutil.copytree(cases / family, folder, ignore=shutil.ignore_patterns("golden*", "meta.json"))
    for path in (cases / f"tokenizer_{family}").iterdir():
        if path.name != "golden_tokenizer.json":
            shutil.copy(path, folder)
    if family == "moss":
        config = json.loads((folder / "config.json").read_text()) | {"n_positions": 1024, "n_ctx": 1024}
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def _llama(config: Mapping[str, Any], **more: Any) -> LlamaForCausalLM:
    keys = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"),
    )
    made = {key: config[key] for key in keys if key in config} | more
    rope = {"rope_type": "default", "rope_theta": float(config.get("rope_theta", 10000))}
    stated = config.get("rope_scaling")
    if stated:
        rope |= {"rope_type": stated["type"], "factor": stated["factor"]}
    if config.get("rotary"):
        kind = {"origin": "default"}.get(config["rotary"]["type"], config["rotary"]["type"])
        rope = {"rope_type": kind, "rope_theta": float(config["rotary"]["base"])}
        rope |= {"factor": config["rotary"].get("scaling_factor", 1.0)} if kind == "dynamic" else {}
    bias = config.get("bias", True)
    return LlamaForCausalLM(LlamaConfig(**made, rope_parameters=rope, attention_bias=bias, pad_token_id=0))


def _internlm2(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    groups = config.get("num_key_value_heads", config["num_attention_heads"])
    names = {
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "embed_tokens": "tok_embeddings",
        "lm_head": "output",
    }
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if "k_proj" in name or "v_proj" in name:
            continue
        if "q_proj" in name:
            q, k, v = (tensors[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj"))
            parts = []
            for g in range(groups):
                for x in (q, k, v):
                    rows = x.shape[0] // groups
                    parts.append(x[g * rows : (g + 1) * rows])
            made[name.replace("self_attn.q_proj", "attention.wqkv")] = torch.cat(parts)
            continue
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        made[name] = tensor
    return made


def _codegen(config: Mapping[str, Any]) -> CodeGenForCausalLM:
    keys = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "layer_norm_epsilon")
    made = {key: config[key] for key in keys if key in config}
    rotary = config.get("rotary_dim") or config["n_embd"] // config["n_head"]
    tie = config.get("tie_word_embeddings", False)
    return CodeGenForCausalLM(CodeGenConfig(**made, rotary_dim=rotary, tie_word_embeddings=tie))


def _glm(config: Mapping[str, Any]) -> GlmForCausalLM:
    heads = config["num_attention_heads"]
    rope = {"rope_type": "default", "rope_theta": 10000.0 * config.get("rope_ratio", 1)}
    return GlmForCausalLM(
        GlmConfig(
            vocab_size=config["padded_vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["ffn_hidden_size"],
            num_hidden_layers=config["num_layers"],
            num_attention_heads=heads,
            num_key_value_heads=config["multi_query_group_num"] if config["multi_query_attention"] else heads,
            head_dim=config["kv_channels"],
            attention_bias=config["add_qkv_bias"],
            rms_norm_eps=config["layernorm_epsilon"],
            max_position_embeddings=config["seq_length"],
            rope_parameters=rope | {"partial_rotary_factor": 0.5},
            pad_token_id=0,
            eos_token_id=2,
        )
    )


def _chatglm2(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    heads = config["num_attention_heads"]
    names = {
        "model.embed_tokens": "transformer.embedding.word_embeddings",
        "model.layers.": "transformer.encoder.layers.",
        "self_attn.o_proj": "self_attention.dense",
        "mlp.gate_up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
        "model.norm": "transformer.encoder.final_layernorm",
        "lm_head": "transformer.output_layer",
    }
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if "k_proj" in name or "v_proj" in name:
            continue
        if "q_proj" in name:
            parts = [tensors[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            if config["multi_query_attention"]:
                tensor = torch.cat(parts)
            else:
                d = config["kv_channels"]
                tensor = torch.cat([x[j * d : (j + 1) * d] for j in range(heads) for x in parts])
            name = name.replace("self_attn.q_proj", "self_attention.query_key_value")
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        made[name] = tensor
    return made


_LLAMA_LIKE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
    "auto_map": {"AutoConfig": "configuration_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"},
}

FAMILIES = {
    "internlm": Family(
        {**_LLAMA_LIKE, "model_type": "internlm", "rms_norm_eps": 1e-6, "pad_token_id": 0},
        {
            "plain": {"bias": True},
            "bias_not_stated": {},
            "no_bias": {"bias": False, "rms_norm_eps": 1e-5, "attn_implementation": "eager"},
            "other_heads": {"num_attention_heads": 2, "num_hidden_layers": 3, "intermediate_size": 40},
            "tied": {"tie_word_embeddings": True},
            "untied": {"tie_word_embeddings": False, "num_key_value_heads": 4},
            "theta": {"rope_theta": 500.0},
            "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rotary": {"rotary": {"base": 5000, "type": "dynamic"}},
            "rotary_origin": {"rotary": {"base": 5000, "type": "origin"}},
        },
        _llama,
        lambda tensors, config: {
            **tensors,
            **{
                f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4)
                for i in range(config["num_hidden_layers"])
            },
        },
        "llama",
    ),
    "internlm2": Family(
        {
            **_LLAMA_LIKE,
            "model_type": "internlm2",
            "rms_norm_eps": 1e-5,
            "pad_token_id": 2,
            "bias": False,
            "rope_theta": 1000000,
            "rope_scaling": None,
            "num_key_value_heads": 2,
        },
        {
            "plain": {},
            "bias_four_queries": {"bias": True, "num_attention_heads": 8, "num_key_value_heads": 2},
            "multi_query": {"num_key_value_heads": 1},
            "ungrouped": {"num_key_value_heads": 4},
            "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
            "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "tied": {"tie_word_embeddings": True},
        },
        _llama,
        _internlm2,
        "llama",
    ),
    "moss": Family(
        {
            "model_type": "moss",
            "activation_function": "gelu_new",
            "vocab_size": VOCAB,
            "n_embd": 64,
            "n_head": 4,
            "n_inner": None,
            "n_layer": 2,
            "n_positions": 128,
            "n_ctx": 128,
            "rotary_dim": 8,
            "layer_norm_epsilon": 1e-5,
            "attn_pdrop": 0.0,
            "bos_token_id": 90,
            "eos_token_id": 95,
            "scale_attn_weights": True,
            "torch_dtype": "float32",
            "auto_map": {"AutoModelForCausalLM": "modeling_moss.MossForCausalLM"},
        },
        {
            "plain": {},
            "two_heads_a_block": {"n_head": 8, "n_layer": 3},
            "full_rotary": {"rotary_dim": 16},
            "rotary_null": {"rotary_dim": None},
            "inner": {"n_inner": 100, "layer_norm_epsilon": 1e-3},
            "tied": {"tie_word_embeddings": True},
        },
        _codegen,
        lambda tensors, config: {
            **tensors,
            **(
                {}
                if config["n_head"] == 8
                else {
                    f"transformer.h.{i}.attn.causal_mask": torch.ones(1, 1, 128, 128, dtype=torch.bool)
                    for i in range(config["n_layer"])
                }
            ),
        },
        "codegen",
    ),
    "chatglm2": Family(
        {
            "model_type": "chatglm",
            "add_bias_linear": False,
            "add_qkv_bias": True,
            "apply_query_key_layer_scaling": True,
            "apply_residual_connection_post_layernorm": False,
            "attention_dropout": 0.0,
            "ffn_hidden_size": 56,
            "hidden_size": 32,
            "kv_channels": 8,
            "layernorm_epsilon": 1e-5,
            "multi_query_attention": True,
            "multi_query_group_num": 2,
            "num_attention_heads": 4,
            "num_layers": 2,
            "padded_vocab_size": VOCAB,
            "post_layer_norm": True,
            "rmsnorm": True,
            "seq_length": 128,
            "tie_word_embeddings": False,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "torch_dtype": "float32",
            "auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"},
        },
        {
            "plain": {},
            "wide_heads": {"kv_channels": 12},
            "one_group": {"multi_query_group_num": 1},
            "four_groups_of_two": {"num_attention_heads": 8, "multi_query_group_num": 4},
            "groups_as_heads": {"multi_query_group_num": 4},
            "no_qkv_bias": {"add_qkv_bias": False},
            "by_head": {"multi_query_attention": False},
            "rope_ratio": {"rope_ratio": 50},
        },
        _glm,
        _chatglm2,
        "glm",
    ),
}
VARIANTS = [(family, variant) for family, found in FAMILIES.items() for variant in found.variants]
