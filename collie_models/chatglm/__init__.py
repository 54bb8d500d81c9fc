"""ChatGLM-6B, ChatGLM2-6B and ChatGLM3-6B: the model plugin `chatglm`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from collie_core.hookspecs import hookimpl
from collie_models.decoder.family import DecoderFamily, lazily

if TYPE_CHECKING:
    from collie_core.hookspecs import ModelProvider
    from collie_models.chatglm.provider import ChatGLM2ForCausalLM
    from collie_models.chatglm.provider_v1 import ChatGLMForCausalLM

__all__ = ["ChatGLM", "ChatGLM2ForCausalLM", "ChatGLMForCausalLM"]


class ChatGLM(DecoderFamily):
    """ChatGLM-6B, ChatGLM2-6B and ChatGLM3-6B."""

    supports = ("flash", "tp", "pp", "export as glm (not ChatGLM-6B)")
    checkpoints = (
        {
            "name": "THUDM/chatglm-6b",
            "parameters": "6.2B",
            "licence": "weights: commercial use on registration",
        },
        {
            "name": "THUDM/chatglm2-6b",
            "parameters": "6.2B",
            "licence": "weights: commercial use on registration",
        },
        {
            "name": "THUDM/chatglm3-6b",
            "parameters": "6.2B",
            "licence": "weights: commercial use on registration",
        },
        {
            "name": "THUDM/chatglm3-6b-base",
            "parameters": "6.2B",
            "licence": "weights: commercial use on registration",
        },
    )

    @hookimpl
    def collie_model_provider(self, checkpoint: Any) -> ModelProvider:
        """The provider of one of the two architectures that share the model_type, by the config's keys."""
        from collie_models.chatglm.provider import provider_for

        return provider_for(checkpoint.config)


__getattr__ = lazily(
    {
        "ChatGLMForCausalLM": "collie_models.chatglm.provider_v1",
        "ChatGLM2ForCausalLM": "collie_models.chatglm.provider",
    }
)
