"""Keys of a `config.json`: those that released checkpoints carry pass, others are refused by name."""

from __future__ import annotations

import re
from typing import Any

import pytest

from collie_core import AutoModelForCausalLM
from collie_core.errors import ConfigError
from collie_core.models.provider import provider_for

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
#: What transformers 4 writes beside a model's own keys: `PretrainedConfig.to_dict()` of 4.28.
WRITTEN: dict[str, Any] = {
    **{"return_dict": True, "output_hidden_states": False, "output_attentions": False, "torchscript": False},
    **{"torch_dtype": "float16", "use_bfloat16": False, "tf_legacy_loss": False, "pruned_heads": {}},
    **{"is_encoder_decoder": False, "is_decoder": False, "cross_attention_hidden_size": None},
    **{"add_cross_attention": False, "tie_encoder_decoder": False, "max_length": 20, "min_length": 0},
    **{"do_sample": False, "early_stopping": False, "num_beams": 1, "num_beam_groups": 1, "top_k": 50},
    **{"diversity_penalty": 0.0, "temperature": 1.0, "top_p": 1.0, "typical_p": 1.0, "length_penalty": 1.0},
    **{"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0},
    **{"bad_words_ids": None, "num_return_sequences": 1, "chunk_size_feed_forward": 0, "prefix": None},
    **{"output_scores": False, "return_dict_in_generate": False, "forced_bos_token_id": None},
    **{"forced_eos_token_id": None, "remove_invalid_values": False, "suppress_tokens": None},
    **{"exponential_decay_length_penalty": None, "begin_suppress_tokens": None, "finetuning_task": None},
    **{"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}},
    **{"tokenizer_class": None, "bos_token_id": 1, "pad_token_id": None, "eos_token_id": 2},
    **{"sep_token_id": None, "decoder_start_token_id": None, "task_specific_params": None},
    **{"problem_type": None, "_name_or_path": "out", "transformers_version": "4.28.1", "use_cache": True},
}
#: The keys of released checkpoints, in small: what is beside SIZES and the model_type.
RELEASED: dict[str, dict[str, Any]] = {
    "llama huggyllama": {"max_sequence_length": 2048, "max_position_embeddings": 2048, "pretraining_tp": 2},
    "llama 3.2": {
        **{"attention_bias": False, "attention_dropout": 0.0, "head_dim": 8, "mlp_bias": False},
        **{"rope_theta": 500000.0, "eos_token_id": [90, 91], "tie_word_embeddings": True},
        "rope_scaling": {
            **{"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3"},
            "original_max_position_embeddings": 8192,
        },
    },
    "llama Yarn-Llama-2": {
        "rope_scaling": {
            **{"factor": 16.0, "original_max_position_embeddings": 4096, "type": "yarn"},
            "finetuned": True,
        },
    },
    "llama SmolLM2": {
        **{"is_llama_config": True, "rope_interleaved": False, "rope_scaling": None},
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    },
    "llama Falcon3": {"activation": "swiglu", "hidden_act": "silu", "head_dim": 16},
    "llama fine-tuned": {"unsloth_version": "2024.9", "_flash_attn_2_enabled": True},
    "llama of Qwen": {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 2},
    "llama of transformers 5": {
        **{"dtype": "bfloat16", "layer_types": ["full_attention"] * 2},
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "mistral v0.3": {"sliding_window": None, "attention_dropout": 0.0, "num_key_value_heads": 2},
    "qwen2 Qwen2.5-0.5B": {
        **{"max_window_layers": 24, "sliding_window": 32768, "use_mrope": False, "use_sliding_window": False},
        **{"num_key_value_heads": 2, "attention_dropout": 0.0},
    },
    "qwen3 0.6B": {
        **{"attention_bias": False, "head_dim": 128, "max_window_layers": 28, "sliding_window": None},
        **{"num_key_value_heads": 2, "use_sliding_window": False, "rope_scaling": None},
    },
    "internlm2 chat": {"bias": False, "attn_implementation": "eager", "pretraining_tp": 1},
    "gpt2 openai": {
        **{"n_ctx": 1024, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64},
        **{"summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True},
        **{"summary_type": "cls_index", "summary_use_proj": True},
    },
    "gpt_neox pythia": {"rotary_emb_base": 10000, "rotary_pct": 0.25, "use_parallel_residual": True},
    "gptj 6B": {"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary": True, "scale_attn_weights": True},
    "phi 2": {"partial_rotary_factor": 0.5, "qk_layernorm": False, "rope_scaling": None, "rope_theta": 1e4},
    "phi3 mini": {
        **{"attention_bias": False, "original_max_position_embeddings": 4096, "sliding_window": 2047},
        **{"embd_pdrop": 0.0, "resid_pdrop": 0.0, "pad_token_id": 0},
    },
    "gemma 2b": {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "head_dim": 8},
    "gemma2 2b": {
        **{"cache_implementation": "hybrid", "hidden_act": "gelu_pytorch_tanh", "head_dim": 8},
        **{"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 8, "sliding_window": 16},
    },
    "gemma3_text 1b": {"rope_local_base_freq": 10000, "sliding_window_pattern": 6, "head_dim": 8},
    "opt 125m": {
        **{"_remove_final_layer_norm": False, "activation_dropout": 0.0, "dropout": 0.0, "ffn_dim": 48},
        **{"init_std": 0.02, "prefix": "</s>", "word_embed_proj_dim": 32, "pad_token_id": 1},
    },
    "starcoder2 3b": {"activation_function": "gelu_pytorch_tanh", "mlp_type": "default", "use_bias": True},
}


@pytest.mark.parametrize("name", RELEASED)
def test_keys_of_released_checkpoints_pass(name: str) -> None:
    content = {**WRITTEN, **SIZES, "model_type": name.split()[0], **RELEASED[name]}
    if {"n_embd", "ffn_dim"} & content.keys():  # they call it otherwise
        del content["intermediate_size"]
    provider_for(content, None)


LLAMA = {"model_type": "llama", **SIZES}
REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (LLAMA, {"rope_thetas": 5e5}, "unknown key 'rope_thetas', did you mean 'rope_theta'?"),
    (LLAMA, {"use_magic": None}, "unknown key 'use_magic'"),
    (LLAMA, {"rope_interleaved": True}, "rope_interleaved: True is not supported"),
    (LLAMA, {"attention_dropout": 0.1}, "attention_dropout: 0.1 is not supported"),
    (LLAMA, {"sliding_window": 4096}, "sliding_window: 4096 is not supported"),
    (LLAMA, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: ["),
    (LLAMA, {"add_cross_attention": True}, "add_cross_attention: True is not supported"),
    (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config: {'bits': 4} is not supported"),
    ({**LLAMA, "model_type": "mistral"}, {"slidng_window": 8}, "'slidng_window', did you mean 'sliding"),
    ({**LLAMA, "model_type": "qwen2"}, {"use_mrope": True}, "use_mrope: True is not supported"),
    ({**LLAMA, "model_type": "qwen3"}, {"n_experts": 4}, "unknown key 'n_experts'"),
    ({"model_type": "gpt_neox", **SIZES}, {"rotary_pc": 0.5}, "'rotary_pc', did you mean 'rotary_pct'?"),
    ({"model_type": "gpt2"}, {"n_layers": 2}, "unknown key 'n_layers', did you mean 'n_layer'?"),
    ({"model_type": "gpt2"}, {"rope_theta": 5.0}, "unknown key 'rope_theta'"),
    ({"model_type": "gptj"}, {"scale_attn_weights": False}, "scale_attn_weights: False is not supported"),
    ({"model_type": "phi3", **SIZES}, {"attention_bias": True}, "attention_bias: True is not supported"),
    ({"model_type": "gemma", **SIZES}, {"hidden_activation": "relu"}, "hidden_activation: 'relu'"),
]


@pytest.mark.parametrize(("config", "changes", "message"), REFUSED)
def test_others_are_refused_by_name(config: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        AutoModelForCausalLM.from_config(config | changes)
