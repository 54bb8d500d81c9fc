"""What a config selects: `layout: {name: deepspeed, zero_stage: 2}`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from collie_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from collie_core.hookspecs import Layout
    from collie_core.run import Run


class DeepSpeedLayoutPlugin:
    """DeepSpeed's ZeRO, with offload, over data-parallel ranks."""

    collie_api = 1

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Keys of `layout:`.

        zero_stage: what data-parallel ranks share: 0 nothing, 1 optimizer states, 2 gradients too, 3 weights
        too.  offload: to host memory: `optimizer` its states and their update, `cpu` with zero_stage 3 the
        weights too.  ds_config: a file of JSON, or a mapping, as DeepSpeed reads it; what it says must not
        contradict the config, and "auto" is filled in.
        """

        zero_stage: Literal[0, 1, 2, 3] = 2
        offload: Literal["none", "optimizer", "cpu"] = "none"
        ds_config: str | dict[str, Any] | None = None

    def __init__(self, options: Options) -> None:
        self.options = options

    @hookimpl
    def collie_check(self, run: Run) -> list[str]:
        """What DeepSpeed, or this layout of it, cannot serve.  Raises ConfigError for an unreadable file."""
        from collie_methods.deepspeed_layout.ds_config import problems
        from collie_methods.deepspeed_layout.rules import refusals

        return refusals(run.config, self.options) + problems(run.config, self.options)

    @hookimpl
    def collie_layout(self, run: Run) -> Layout:
        """The layout of this run."""
        from collie_methods.deepspeed_layout.layout import DeepSpeedLayout

        return DeepSpeedLayout(run, self.options)
