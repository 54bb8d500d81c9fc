"""NF4 and int8 by blocks along rows, with bitsandbytes' kernels, on CPU and CUDA."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

_SCALE_BYTES = 4  # fp32, not quantised again


@dataclass(frozen=True)
class BlockFormat(ABC):
    """A `collie_core.plugin.Packing`: a block is its scale, the largest magnitude in it, then its codes."""

    block: int
    section: Mapping[str, Any]

    code_bits = 0

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return _SCALE_BYTES + self.block * self.code_bits // 8

    def pack(self, values: Tensor) -> Tensor:
        """values fp32 (rows, inputs) -> uint8 (rows, inputs / block * block_bytes)."""
        rows = values.shape[0]
        codes, scales = self.quantise(values)
        blocks = [scales.view(rows, -1, 1).view(torch.uint8), codes.view(rows, scales.numel() // rows, -1)]
        return torch.cat(blocks, -1).flatten(1)

    def unpack(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """stored uint8 (rows, columns) -> (rows, inputs) in `dtype`."""
        blocks = stored.unflatten(1, (-1, self.block_bytes))
        scales = blocks[..., :_SCALE_BYTES].contiguous().view(torch.float32).flatten()
        codes = blocks[..., _SCALE_BYTES:].contiguous().flatten(1)
        return self.dequantise(codes, scales, (stored.shape[0], blocks.shape[1] * self.block), dtype)

    @abstractmethod
    def quantise(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(codes uint8, scales fp32), both flat, row by row."""

    @abstractmethod
    def dequantise(
        self, codes: Tensor, scales: Tensor, shape: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        """The inverse; codes (rows, bytes)."""


class Nf4(BlockFormat):
    """4-bit NormalFloat (Dettmers et al. 2023, arXiv 2305.14314, section 3)."""

    code_bits = 4

    def quantise(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """As `BlockFormat.quantise`."""
        codes, state = bnb.quantize_4bit(values, blocksize=self.block, quant_type="nf4")
        return codes, state.absmax

    def dequantise(
        self, codes: Tensor, scales: Tensor, shape: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        """As `BlockFormat.dequantise`."""
        made: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
            codes.view(-1, 1), scales, self.block, "nf4", shape, dtype
        )
        return made


@dataclass(frozen=True)
class Int8(BlockFormat):
    """255 even steps from minus to plus the largest magnitude of a block."""

    #: where each code lies, by device: made by what packs, since the compiler cannot follow how
    steps: dict[torch.device, Tensor] = field(default_factory=dict, compare=False, repr=False)

    code_bits = 8

    def quantise(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """As `BlockFormat.quantise`."""
        codes, state = bnb.quantize_blockwise(values, code=self._steps(values.device), blocksize=self.block)
        return codes, state.absmax

    def dequantise(
        self, codes: Tensor, scales: Tensor, shape: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        """As `BlockFormat.dequantise`."""
        made: Tensor = torch.ops.bitsandbytes.dequantize_blockwise(
            codes, scales, self._steps(codes.device), self.block, dtype
        )
        return made

    def _steps(self, device: torch.device) -> Tensor:
        if device not in self.steps:
            self.steps[device] = bnb.create_linear_map(signed=True, total_bits=8).to(device)
        return self.steps[device]
