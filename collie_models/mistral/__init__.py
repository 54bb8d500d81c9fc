"""Mistral: the model plugin `mistral`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from collie_models.decoder.family import DecoderFamily, lazily

if TYPE_CHECKING:
    from collie_models.mistral.provider import MistralForCausalLM

__all__ = ["Mistral", "MistralForCausalLM"]


class Mistral(DecoderFamily):
    """Mistral 7B and its dense relatives."""

    provider = "collie_models.mistral.provider:MistralProvider"
    supports = ("flash", "tp", "pp", "sliding window")
    checkpoints = (
        {"name": "mistralai/Mistral-7B-v0.1", "parameters": "7.2B"},
        {"name": "mistralai/Mistral-7B-v0.3", "parameters": "7.2B"},
        {"name": "mistralai/Mistral-7B-Instruct-v0.2", "parameters": "7.2B"},
        {"name": "mistralai/Mistral-7B-Instruct-v0.3", "parameters": "7.2B"},
        {"name": "mistralai/Mistral-Nemo-Base-2407", "parameters": "12.2B"},
    )


__getattr__ = lazily({"MistralForCausalLM": "collie_models.mistral.provider"})
