"""InternLM and InternLM2: the model plugins `internlm` and `internlm2`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from collie_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from collie_core.hookspecs import ModelProvider
    from collie_models.internlm.provider import InternLM2ForCausalLM, InternLMForCausalLM

__all__ = ["InternLM", "InternLM2", "InternLM2ForCausalLM", "InternLMForCausalLM"]


class InternLM:
    """InternLM."""

    collie_api = 1
    supports = ("flash", "tp", "pp", "export as llama")
    checkpoints = (
        {
            "name": "internlm/internlm-7b",
            "parameters": "7.3B",
            "licence": "weights: commercial use on registration",
        },
        {
            "name": "internlm/internlm-chat-7b",
            "parameters": "7.3B",
            "licence": "weights: commercial use on registration",
        },
        {
            "name": "internlm/internlm-chat-7b-8k",
            "parameters": "7.3B",
            "licence": "weights: commercial use on registration",
        },
        {
            "name": "internlm/internlm-20b",
            "parameters": "20.1B",
            "licence": "weights: commercial use on registration",
        },
        {
            "name": "internlm/internlm-chat-20b",
            "parameters": "20.1B",
            "licence": "weights: commercial use on registration",
        },
    )

    @dataclass(frozen=True)
    class Options:
        """It has no options."""

    def __init__(self, options: Options) -> None:
        self.options = options

    @hookimpl
    def collie_model_provider(self) -> ModelProvider:
        """The provider; it is the same for every checkpoint of the family."""
        from collie_models.internlm.provider import InternLMProvider

        return InternLMProvider()


class InternLM2:
    """InternLM2."""

    collie_api = 1
    supports = ("flash", "tp", "pp", "export as llama")
    checkpoints = (
        {
            "name": "internlm/internlm2-1_8b",
            "parameters": "1.9B",
            "licence": "weights: commercial use on registration",
        },
        {
            "name": "internlm/internlm2-7b",
            "parameters": "7.7B",
            "licence": "weights: commercial use on registration",
        },
        {
            "name": "internlm/internlm2-chat-7b",
            "parameters": "7.7B",
            "licence": "weights: commercial use on registration",
        },
        {
            "name": "internlm/internlm2-20b",
            "parameters": "19.9B",
            "licence": "weights: commercial use on registration",
        },
    )

    @dataclass(frozen=True)
    class Options:
        """It has no options."""

    def __init__(self, options: Options) -> None:
        self.options = options

    @hookimpl
    def collie_model_provider(self) -> ModelProvider:
        """The provider; it is the same for every checkpoint of the family."""
        from collie_models.internlm.provider import InternLM2Provider

        return InternLM2Provider()


def __getattr__(name: str) -> Any:
    if name in ("InternLMForCausalLM", "InternLM2ForCausalLM"):
        from collie_models.internlm import provider

        return getattr(provider, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
