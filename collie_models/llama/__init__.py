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
