"""Puts quantised weights in the place of a model's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from collie_core.plugin import ConfigError, UserError, block_linears, pack_linear, unpack_linears
from collie_methods.quant.formats import Int8, Nf4

if TYPE_CHECKING:
    from collie_core.shard import Shard
    from collie_methods.quant.plugin import QuantOptions

_FORMATS = {"nf4": Nf4, "int8": Int8}


class Quantiser:
    """One entry of `adapters:`; see `collie_core.hookspecs.Adapter`.  It adds no parameter."""

    def __init__(self, kind: str, options: QuantOptions) -> None:
        self.name, self.options = kind, options
        section = {"name": kind, **dataclasses.asdict(options), "skip_modules": list(options.skip_modules)}
        self.format = _FORMATS[kind](options.block_size, section)

    def adapt(self, model: nn.Module) -> None:
        """Raises ConfigError for rows that are no whole blocks, and names that fit no linear."""
        paths = block_linears(model, self.options.skip_modules)
        if not paths:
            raise ConfigError(f"adapter {self.name}: skip_modules leaves no linear to quantise")
        for path in paths:
            try:
                pack_linear(model, path, self.format)
            except ConfigError as error:
                raise ConfigError(
                    f"adapter {self.name}: {error}; set block_size, or leave {path} out by skip_modules"
                ) from None

    def initialise(self, name: str, values: Tensor, shard: Shard) -> None:
        """There is nothing of its own to fill."""
        raise UserError(f"adapter {self.name} has no parameter {name}")

    def merge(self, model: nn.Module) -> None:
        """Weights again, of the quantised values."""
        unpack_linears(model)

    def save(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Nothing is written: the weights are quantised anew whenever they are read."""

    def load(self, folder: Path) -> None:
        """Nothing is read."""
