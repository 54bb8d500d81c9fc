"""Mistral: the model plugin `mistral`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from collie_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from collie_core.hookspecs import ModelProvider
    from collie_models.mistral.provider import MistralForCausalLM

__all__ = ["Mistral", "MistralForCausalLM"]


class Mistral:
    """Mistral 7B and its dense relatives."""

    collie_api = 1
    supports = ("flash", "tp", "pp", "sliding window")
    checkpoints = (
        {"name": "mistralai/Mistral-7B-v0.1", "parameters": "7.2B"},
        {"name": "mistralai/Mistral-7B-v0.3", "parameters": "7.2B"},
        {"name": "mistralai/Mistral-7B-Instruct-v0.2", "parameters": "7.2B"},
        {"name": "mistralai/Mistral-7B-Instruct-v0.3", "parameters": "7.2B"},
        {"name": "mistralai/Mistral-Nemo-Base-2407", "parameters": "12.2B"},
    )

    @dataclass(frozen=True)
    class Options:
        """It has no options."""

    def __init__(self, options: Options) -> None:
        self.options = options

    @hookimpl
    def collie_model_provider(self) -> ModelProvider:
        """The provider; it is the same for every checkpoint of the family."""
        from collie_models.mistral.provider import MistralProvider

        return MistralProvider()


def __getattr__(name: str) -> Any:
    if name == "MistralForCausalLM":
        from collie_models.mistral.provider import MistralForCausalLM

        return MistralForCausalLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
