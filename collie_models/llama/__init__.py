"""LLaMA 1, 2 and 3, and OpenLLaMA: the model plugin `llama`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from collie_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from collie_core.hookspecs import ModelProvider
    from collie_models.llama.provider import LlamaForCausalLM

__all__ = ["Llama", "LlamaForCausalLM"]


class Llama:
    """LLaMA 1, 2 and 3, and OpenLLaMA."""

    collie_api = 1
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

    @dataclass(frozen=True)
    class Options:
        """It has no options."""

    def __init__(self, options: Options) -> None:
        self.options = options

    @hookimpl
    def collie_model_provider(self) -> ModelProvider:
        """The provider; it is the same for every checkpoint of the family."""
        from collie_models.llama.provider import LlamaProvider

        return LlamaProvider()


def __getattr__(name: str) -> Any:
    if name == "LlamaForCausalLM":
        from collie_models.llama.provider import LlamaForCausalLM

        return LlamaForCausalLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
