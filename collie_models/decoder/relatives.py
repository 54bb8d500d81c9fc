"""What the configs of all relatives that transformers implements have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from collie_models.decoder.config import DecoderConfig


def shared_keys(
    model_type: str, architecture: str, config: DecoderConfig, hf_config: Mapping[str, Any]
) -> dict[str, Any]:
    """Sizes, special tokens and dtype under the keys that transformers gives them."""
    dtypes = {key: hf_config[key] for key in ("torch_dtype", "dtype") if hf_config.get(key) is not None}
    eos = config.eos_token_id
    return dtypes | {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
        "bos_token_id": hf_config.get("bos_token_id"),
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "pad_token_id": config.pad_token_id,
    }
