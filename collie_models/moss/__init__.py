"""MOSS: the model plugin `moss`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from collie_models.decoder.family import DecoderFamily, lazily

if TYPE_CHECKING:
    from collie_models.moss.provider import MossForCausalLM

__all__ = ["Moss", "MossForCausalLM"]


class Moss(DecoderFamily):
    """MOSS."""

    provider = "collie_models.moss.provider:MossProvider"
    supports = ("flash", "tp", "pp", "export as codegen")
    checkpoints = (
        {"name": "fnlp/moss-moon-003-base", "parameters": "16.7B", "licence": "weights: AGPL-3.0"},
        {"name": "fnlp/moss-moon-003-sft", "parameters": "16.7B", "licence": "weights: AGPL-3.0"},
        {"name": "fnlp/moss-moon-003-sft-plugin", "parameters": "16.7B", "licence": "weights: AGPL-3.0"},
    )


__getattr__ = lazily({"MossForCausalLM": "collie_models.moss.provider"})
