"""Keys of a `config.json` that change nothing of what a model computes, and values that change nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Written by transformers, in one version or another.
_OF_MODELS = """
_attn_implementation_autoset _commit_hash _name_or_path architectures auto_map dtype finetuning_task
gradient_checkpointing id2label is_decoder label2id model_type name_or_path output_attentions
output_hidden_states prefix problem_type return_dict sep_token_id summary_activation summary_first_dropout
summary_proj_to_labels summary_type summary_use_proj task_specific_params tf_legacy_loss tokenizer_class
torch_dtype torchscript transformers_version use_bfloat16 use_cache
"""
_OF_GENERATION = """
bad_words_ids begin_suppress_tokens bos_token_id cache_implementation decoder_start_token_id
diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size eos_token_id
exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length
max_new_tokens min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores
pad_token_id remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens temperature
top_k top_p typical_p
"""
#: Left by converters, trainers and other runtimes: which kernel computes the same, and for how long a text.
#: pretraining_tp only cuts sums into parts.
_OF_TOOLS = """
_attn_implementation _flash_attn_2_enabled attention_implementation attn_implementation is_llama_config
keys_to_ignore_at_inference max_sequence_length max_window_layers model_max_length n_ctx neftune_noise_alpha
num_logits_to_keep pretraining_tp tokenizer_model_max_length tokenizer_padding_side transformers.js_config
unsloth_fixed unsloth_version use_flash_attention_2 use_flash_attn
"""
HARMLESS: tuple[str, ...] = (*_OF_MODELS.split(), *_OF_GENERATION.split(), *_OF_TOOLS.split())

#: key -> the values (beside null) that change nothing, for models that do not compute what it asks for
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "activation_dropout": (0,),
    "add_cross_attention": (False,),
    "alibi": (False,),
    "attention_bias": (False,),
    "attention_dropout": (0,),
    "attention_probs_dropout_prob": (0,),
    "attn_logit_softcapping": (),
    "attn_pdrop": (0,),
    "chunk_size_feed_forward": (0,),
    "compression_config": (),
    "cross_attention_hidden_size": (),
    "embd_pdrop": (0,),
    "final_logit_softcapping": (),
    "hidden_dropout": (0,),
    "is_encoder_decoder": (False,),
    "layer_types": (),
    "logit_scale": (1,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1,),
    "pruned_heads": ({},),
    "qk_layer_norms": (False,),
    "qk_layernorm": (False,),
    "quantization_config": (),
    "resid_pdrop": (0,),
    "rope_interleaved": (False,),
    "rope_scaling": (),
    "sliding_window": (),
    "tie_encoder_decoder": (False,),
    "use_mrope": (False,),
    "use_qk_norm": (False,),
    "use_sliding_window": (False,),
}
