"""Qwen2, Qwen2.5 and Qwen3: the model plugins `qwen2` and `qwen3`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from collie_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from collie_core.hookspecs import ModelProvider
    from collie_models.qwen.provider import Qwen2ForCausalLM, Qwen3ForCausalLM

__all__ = ["Qwen2", "Qwen2ForCausalLM", "Qwen3", "Qwen3ForCausalLM"]


class Qwen2:
    """Qwen2 and Qwen2.5."""

    collie_api = 1
    supports = ("flash", "tp", "pp")
    checkpoints = (
        {"name": "Qwen/Qwen2-0.5B", "parameters": "0.5B"},
        {"name": "Qwen/Qwen2-7B", "parameters": "7.6B"},
        {"name": "Qwen/Qwen2.5-0.5B", "parameters": "0.5B"},
        {"name": "Qwen/Qwen2.5-1.5B", "parameters": "1.5B"},
        {"name": "Qwen/Qwen2.5-3B", "parameters": "3.1B", "licence": "see the checkpoint's page"},
        {"name": "Qwen/Qwen2.5-7B", "parameters": "7.6B"},
        {"name": "Qwen/Qwen2.5-7B-Instruct", "parameters": "7.6B"},
        {"name": "Qwen/Qwen2.5-32B", "parameters": "32.8B"},
        {"name": "Qwen/Qwen2.5-72B", "parameters": "72.7B", "licence": "see the checkpoint's page"},
    )

    @dataclass(frozen=True)
    class Options:
        """It has no options."""

    def __init__(self, options: Options) -> None:
        self.options = options

    @hookimpl
    def collie_model_provider(self) -> ModelProvider:
        """The provider; it is the same for every checkpoint of the family."""
        from collie_models.qwen.provider import Qwen2Provider

        return Qwen2Provider()


class Qwen3:
    """Qwen3, the dense models."""

    collie_api = 1
    supports = ("flash", "tp", "pp")
    checkpoints = (
        {"name": "Qwen/Qwen3-0.6B", "parameters": "0.6B"},
        {"name": "Qwen/Qwen3-1.7B", "parameters": "1.7B"},
        {"name": "Qwen/Qwen3-4B", "parameters": "4.0B"},
        {"name": "Qwen/Qwen3-8B", "parameters": "8.2B"},
        {"name": "Qwen/Qwen3-14B", "parameters": "14.8B"},
        {"name": "Qwen/Qwen3-32B", "parameters": "32.8B"},
    )

    @dataclass(frozen=True)
    class Options:
        """It has no options."""

    def __init__(self, options: Options) -> None:
        self.options = options

    @hookimpl
    def collie_model_provider(self) -> ModelProvider:
        """The provider; it is the same for every checkpoint of the family."""
        from collie_models.qwen.provider import Qwen3Provider

        return Qwen3Provider()


def __getattr__(name: str) -> Any:
    if name in ("Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        from collie_models.qwen import provider

        return getattr(provider, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
