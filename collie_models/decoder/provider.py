"""What providers of families on the shared decoder have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from collie_core.plugin import ParallelPlan, Relative, WeightRule
from collie_models.decoder.config import DecoderConfig
from collie_models.decoder.llama_names import llama_weight_map
from collie_models.decoder.model import Decoder
from collie_models.decoder.plan import decoder_parallel_plan

if TYPE_CHECKING:
    from collie_core.ops import Ops


class DecoderProvider:
    """Serves `model_class`; a family adds `read_config`, `weight_map` and `tokenizer`."""

    template: str | None = None
    export_as: Mapping[str, Relative] = {}
    model_class: type[Decoder] = Decoder

    def build(self, config: Any, ops: Ops) -> Decoder:
        """The module; see `ModelProvider.build`."""
        return self.model_class(config, ops)

    def parallel_plan(self, config: DecoderConfig) -> ParallelPlan:
        """Attention by heads, MLP by its inner width, embedding and head by vocabulary."""
        return decoder_parallel_plan(config)


class LlamaLikeProvider(DecoderProvider):
    """A decoder whose checkpoints have LLaMA's names; a family adds `read_config` and `tokenizer`."""

    def weight_map(self, config: DecoderConfig) -> Sequence[WeightRule]:
        """The names of Hugging Face checkpoints."""
        return llama_weight_map(config)
