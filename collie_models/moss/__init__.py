"""MOSS: the model plugin `moss`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from collie_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from collie_core.hookspecs import ModelProvider
    from collie_core.run import Run
    from collie_models.moss.provider import MossForCausalLM

__all__ = ["Moss", "MossForCausalLM"]


class Moss:
    """MOSS."""

    collie_api = 1
    supports = ("flash", "tp", "pp", "export as codegen")
    checkpoints = (
        {"name": "fnlp/moss-moon-003-base", "parameters": "16.7B", "licence": "weights: AGPL-3.0"},
        {"name": "fnlp/moss-moon-003-sft", "parameters": "16.7B", "licence": "weights: AGPL-3.0"},
        {"name": "fnlp/moss-moon-003-sft-plugin", "parameters": "16.7B", "licence": "weights: AGPL-3.0"},
    )

    @dataclass(frozen=True)
    class Options:
        """It has no options."""

    def __init__(self, options: Options) -> None:
        self.options = options

    @hookimpl
    def collie_model_provider(self) -> ModelProvider:
        """The provider; it is the same for every checkpoint of the family."""
        from collie_models.moss.provider import MossProvider

        return MossProvider()

    @hookimpl
    def collie_check(self, run: Run) -> Sequence[str]:
        """Refuse records that are longer than the model has positions."""
        from collie_models.decoder.model import position_problems

        return position_problems(run)


def __getattr__(name: str) -> Any:
    if name == "MossForCausalLM":
        from collie_models.moss.provider import MossForCausalLM

        return MossForCausalLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
