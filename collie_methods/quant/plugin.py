"""What a config selects: `adapters: [nf4, {name: lora, r: 8}]`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from collie_core.errors import Refusal
from collie_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from collie_core.hookspecs import Adapter
    from collie_core.run import Run

_NAMES = ("nf4", "int8")


@dataclass(frozen=True, kw_only=True)
class QuantOptions:
    """Keys of an entry of `adapters:`.

    block_size: neighbours in a row of a weight that share a scale; it must divide the row.
    skip_modules: names or patterns of linears in the blocks that stay as they are: o_proj, blocks.0.*.
    """

    block_size: Literal[32, 64, 128, 256, 512, 1024] = 64
    skip_modules: tuple[str, ...] = ()


class _QuantPlugin:
    """The linears of the blocks are frozen and quantised; another adapter trains on top of them."""

    collie_api = 1
    supports = ("zero", "tp", "pp", "packing")
    kind = ""
    Options = QuantOptions

    def __init__(self, options: QuantOptions) -> None:
        self.options = options

    @hookimpl
    def collie_check(self, run: Run) -> list[str]:
        """What cannot go together with a quantised base."""
        found: list[str] = []
        names = [section.name.rpartition(":")[2] for section in run.config.adapters]
        if names and all(name in _NAMES for name in names):
            found.append(
                f"adapter {self.kind}: nothing is trained on top of the frozen, quantised weights; add an "
                "adapter that is, such as {name: lora}, to adapters"
            )
        if sum(name in _NAMES for name in names) > 1 and names.index(self.kind) == min(
            names.index(name) for name in _NAMES if name in names
        ):
            found.append(f"adapter {self.kind}: adapters has several that quantise; keep one of them")
        if self.kind == "int8" and self.options.block_size == 32 and run.device.type == "cuda":
            sections = [section.model_dump() for section in run.config.adapters]
            wider = {"block_size": 64}
            found.append(
                Refusal(
                    "adapter int8 with block_size 32 on cuda",
                    "bitsandbytes' kernels of 8 bit take blocks of 64 and more there",
                    {"adapters": [s | wider if s.get("block_size") == 32 else s for s in sections]},
                    "set block_size to 64, or take nf4",
                )
            )
        if run.config.layout.name.rpartition(":")[2] == "deepspeed":
            found.append(
                Refusal(
                    f"adapter {self.kind} and layout deepspeed",
                    "DeepSpeed would cut quantised weights within a block",
                    {"layout": {"name": "native", "zero_stage": 3}},
                    "set layout to {name: native, zero_stage: 3}",
                )
            )
        return found

    @hookimpl
    def collie_adapter(self, run: Run) -> Adapter:
        """The quantiser of this run."""
        from collie_methods.quant.adapter import Quantiser

        return Quantiser(self.kind, self.options)


class Nf4Plugin(_QuantPlugin):
    """4-bit NormalFloat weights, frozen (QLoRA: Dettmers et al. 2023, arXiv 2305.14314)."""

    kind = "nf4"
    weight_bytes = {  # half a byte, and 4 of a block's scale
        "": 0.5625,
        "block_size: 32": 0.625,
        "block_size: 128": 0.53125,
        "block_size: 256": 0.515625,
        "block_size: 512": 0.5078125,
        "block_size: 1024": 0.50390625,
    }


class Int8Plugin(_QuantPlugin):
    """8-bit weights in even steps, frozen."""

    kind = "int8"
    weight_bytes = {  # a byte, and 4 of a block's scale
        "": 1.0625,
        "block_size: 32": 1.125,
        "block_size: 128": 1.03125,
        "block_size: 256": 1.015625,
        "block_size: 512": 1.0078125,
        "block_size: 1024": 1.00390625,
    }
