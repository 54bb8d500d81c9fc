"""Keys that transformers writes into any `config.json` and that change nothing of what a model computes."""

from __future__ import annotations

_OF_MODELS = """
_attn_implementation_autoset _commit_hash _name_or_path add_cross_attention architectures auto_map
chunk_size_feed_forward cross_attention_hidden_size dtype finetuning_task gradient_checkpointing id2label
is_decoder is_encoder_decoder label2id model_type output_attentions output_hidden_states prefix problem_type
pruned_heads return_dict sep_token_id task_specific_params tf_legacy_loss tie_encoder_decoder tokenizer_class
torch_dtype torchscript transformers_version use_bfloat16 use_cache
"""
_OF_GENERATION = """
bad_words_ids begin_suppress_tokens bos_token_id decoder_start_token_id diversity_penalty do_sample
early_stopping encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty forced_bos_token_id
forced_eos_token_id length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams
num_return_sequences output_scores pad_token_id remove_invalid_values repetition_penalty
return_dict_in_generate suppress_tokens temperature top_k top_p typical_p
"""
TRANSFORMERS_KEYS: tuple[str, ...] = (*_OF_MODELS.split(), *_OF_GENERATION.split())
