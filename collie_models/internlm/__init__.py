"""InternLM and InternLM2: the model plugins `internlm` and `internlm2`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from collie_models.decoder.family import DecoderFamily, lazily

if TYPE_CHECKING:
    from collie_models.internlm.provider import InternLM2ForCausalLM, InternLMForCausalLM

__all__ = ["InternLM", "InternLM2", "InternLM2ForCausalLM", "InternLMForCausalLM"]


class InternLM(DecoderFamily):
    """InternLM."""

    provider = "collie_models.internlm.provider:InternLMProvider"
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


class InternLM2(DecoderFamily):
    """InternLM2."""

    provider = "collie_models.internlm.provider:InternLM2Provider"
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


__getattr__ = lazily(
    {
        "InternLMForCausalLM": "collie_models.internlm.provider",
        "InternLM2ForCausalLM": "collie_models.internlm.provider",
    }
)
