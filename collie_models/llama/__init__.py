"""LLaMA 1, 2 and 3, and OpenLLaMA: the model plugin `llama`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from collie_models.decoder.family import DecoderFamily, lazily

if TYPE_CHECKING:
    from collie_models.llama.provider import LlamaForCausalLM

__all__ = ["Llama", "LlamaForCausalLM"]


class Llama(DecoderFamily):
    """LLaMA 1, 2 and 3, and OpenLLaMA."""

    provider = "collie_models.llama.provider:LlamaProvider"
    supports = ("flash", "tp", "pp")
    checkpoints = (
        {"name": "openlm-research/open_llama_3b", "parameters": "3.4B"},
        {"name": "openlm-research/open_llama_7b", "parameters": "6.7B"},
        {"name": "openlm-research/open_llama_13b", "parameters": "13.0B"},
        {"name": "openlm-research/open_llama_7b_v2", "parameters": "6.7B"},
        {"name": "huggyllama/llama-7b", "parameters": "6.7B", "licence": "LLaMA licence: non-commercial"},
        {"name": "meta-llama/Llama-2-7b-hf", "parameters": "6.7B", "licence": "Llama 2 Community License"},
        {"name": "meta-llama/Meta-Llama-3-8B", "parameters": "8.0B", "licence": "Llama 3 Community License"},
        {"name": "meta-llama/Llama-3.1-8B", "parameters": "8.0B", "licence": "Llama 3.1 Community License"},
        {"name": "meta-llama/Llama-3.2-1B", "parameters": "1.2B", "licence": "Llama 3.2 Community License"},
    )


__getattr__ = lazily({"LlamaForCausalLM": "collie_models.llama.provider"})
