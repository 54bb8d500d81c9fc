"""Qwen2, Qwen2.5 and Qwen3: the model plugins `qwen2` and `qwen3`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from collie_models.decoder.family import DecoderFamily, lazily

if TYPE_CHECKING:
    from collie_models.qwen.provider import Qwen2ForCausalLM, Qwen3ForCausalLM

__all__ = ["Qwen2", "Qwen2ForCausalLM", "Qwen3", "Qwen3ForCausalLM"]


class Qwen2(DecoderFamily):
    """Qwen2 and Qwen2.5."""

    provider = "collie_models.qwen.provider:Qwen2Provider"
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


class Qwen3(DecoderFamily):
    """Qwen3, the dense models."""

    provider = "collie_models.qwen.provider:Qwen3Provider"
    supports = ("flash", "tp", "pp")
    checkpoints = (
        {"name": "Qwen/Qwen3-0.6B", "parameters": "0.6B"},
        {"name": "Qwen/Qwen3-1.7B", "parameters": "1.7B"},
        {"name": "Qwen/Qwen3-4B", "parameters": "4.0B"},
        {"name": "Qwen/Qwen3-8B", "parameters": "8.2B"},
        {"name": "Qwen/Qwen3-14B", "parameters": "14.8B"},
        {"name": "Qwen/Qwen3-32B", "parameters": "32.8B"},
    )


__getattr__ = lazily(
    {"Qwen2ForCausalLM": "collie_models.qwen.provider", "Qwen3ForCausalLM": "collie_models.qwen.provider"}
)
