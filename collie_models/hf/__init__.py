"""Models of the transformers library: the model plugins `hf` and `*` (what no other plugin claims)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from collie_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from collie_core.hookspecs import ModelProvider
    from collie_core.run import Run

__all__ = ["Transformers"]


class Transformers:
    """Any causal language model that transformers implements; serves what no other plugin claims."""

    collie_api = 1
    supports = ("flash", "pp", "tp where transformers has a plan")
    checkpoints = (
        {"name": "openai-community/gpt2", "parameters": "0.1B"},
        {"name": "microsoft/phi-2", "parameters": "2.8B"},
        {"name": "google/gemma-2-2b", "parameters": "2.6B", "licence": "Gemma Terms of Use"},
        {"name": "google/gemma-3-1b-pt", "parameters": "1.0B", "licence": "Gemma Terms of Use"},
        {"name": "EleutherAI/pythia-1.4b", "parameters": "1.4B"},
        {"name": "allenai/OLMo-2-1124-7B", "parameters": "7.3B"},
    )

    @dataclass(frozen=True)
    class Options:
        """It has no options."""

    def __init__(self, options: Options) -> None:
        self.options = options

    @hookimpl
    def collie_model_provider(self, checkpoint: Any) -> ModelProvider:
        """The provider; it looks at the names of the checkpoint's tensors, which differ in their prefix."""
        from collie_models.hf.provider import TransformersProvider

        return TransformersProvider(checkpoint.path)

    @hookimpl
    def collie_check(self, run: Run) -> Sequence[str]:
        """Refuse records longer than the learned positions, and tensor parallelism that is not right."""
        if run.source is None:
            return []
        from collie_models.hf.parallel import tensor_parallel_problems

        found: list[str] = []
        provider: Any = run.source.provider
        limit, longest = provider.positions(run.source.config), run.config.data.max_length
        if limit is not None and longest > limit:
            found.append(f"data.max_length: {longest} is above the model's {limit} positions")
        if run.config.tp_size > 1:
            sequence_parallel = run.config.layout.options.get("sequence_parallel", "auto")
            found += tensor_parallel_problems(run.source.config, sequence_parallel)
        return found
