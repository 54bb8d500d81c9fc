"""ChatGLM-6B, ChatGLM2-6B and ChatGLM3-6B: the model plugin `chatglm`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from collie_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from collie_core.hookspecs import ModelProvider
    from collie_core.run import Run
    from collie_models.chatglm.provider import ChatGLM2ForCausalLM
    from collie_models.chatglm.provider_v1 import ChatGLMForCausalLM

__all__ = ["ChatGLM", "ChatGLM2ForCausalLM", "ChatGLMForCausalLM"]


class ChatGLM:
    """ChatGLM-6B, ChatGLM2-6B and ChatGLM3-6B."""

    collie_api = 1
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

    @dataclass(frozen=True)
    class Options:
        """It has no options."""

    def __init__(self, options: Options) -> None:
        self.options = options

    @hookimpl
    def collie_model_provider(self, checkpoint: Any) -> ModelProvider:
        """The provider of one of the two architectures that share the model_type, by the config's keys."""
        from collie_models.chatglm.provider import provider_for

        return provider_for(checkpoint.config)

    @hookimpl
    def collie_check(self, run: Run) -> Sequence[str]:
        """Refuse records that are longer than the model has positions."""
        from collie_models.decoder.model import position_problems

        return position_problems(run)


def __getattr__(name: str) -> Any:
    if name == "ChatGLMForCausalLM":
        from collie_models.chatglm.provider_v1 import ChatGLMForCausalLM

        return ChatGLMForCausalLM
    if name == "ChatGLM2ForCausalLM":
        from collie_models.chatglm.provider import ChatGLM2ForCausalLM

        return ChatGLM2ForCausalLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
