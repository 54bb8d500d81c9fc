"""Rotary frequencies for contexts longer than those of pre-training, by the names of transformers.

Each has `frequencies(dim, theta, ctx)` and `attention_factor`, which multiplies cosine and sine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collie_core.ops import Context


class Scaling(Protocol):
    """How the frequencies theta^(-2i / dim) are changed."""

    @property
    def attention_factor(self) -> float: ...

    def frequencies(self, dim: int, theta: float, ctx: Context) -> Tensor:
        """fp32, (dim / 2,); (B, S, dim / 2) where the length of each packed record matters."""


def inverse_frequencies(dim: int, theta: float | Tensor, device: torch.device) -> Tensor:
    """theta^(-2i / dim) for i < dim / 2, in fp32."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    return 1.0 / (theta**exponents)


def record_lengths(ctx: Context) -> Tensor:
    """Length of the longest record, 0-d; in packed rows the length of each position's own, (B, S, 1)."""
    if ctx.segments is None:
        return ctx.positions.amax() + 1
    positions = ctx.positions.expand_as(ctx.segments)
    longest = torch.zeros_like(positions).scatter_reduce(1, ctx.segments, positions, "amax")
    return longest.gather(1, ctx.segments).unsqueeze(-1) + 1


@dataclass(frozen=True)
class Unscaled:
    """`default`."""

    attention_factor: float = 1.0

    def frequencies(self, dim: int, theta: float, ctx: Context) -> Tensor:
        return inverse_frequencies(dim, theta, ctx.positions.device)


@dataclass(frozen=True)
class HalfPrecision:
    """Frequencies rounded to fp16, as ChatGLM-6B stores them."""

    attention_factor: float = 1.0

    def frequencies(self, dim: int, theta: float, ctx: Context) -> Tensor:
        return inverse_frequencies(dim, theta, ctx.positions.device).half().float()


@dataclass(frozen=True)
class Linear:
    """`linear`: positions divided by a factor (Chen et al. 2023, arXiv 2306.15595)."""

    factor: float
    attention_factor: float = 1.0

    def frequencies(self, dim: int, theta: float, ctx: Context) -> Tensor:
        return inverse_frequencies(dim, theta, ctx.positions.device) / self.factor


@dataclass(frozen=True)
class Dynamic:
    """`dynamic`: a base that grows with records longer than `max_positions` (NTK-aware scaling)."""

    factor: float
    max_positions: int
    attention_factor: float = 1.0

    def frequencies(self, dim: int, theta: float, ctx: Context) -> Tensor:
        length = record_lengths(ctx).clamp(min=self.max_positions)
        stretch = self.factor * length / self.max_positions - (self.factor - 1)
        return inverse_frequencies(dim, theta * stretch ** (dim / (dim - 2)), ctx.positions.device)


@dataclass(frozen=True)
class Llama3:
    """`llama3`: low frequencies divided, high ones kept, a smooth passage between (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int
    attention_factor: float = 1.0

    def frequencies(self, dim: int, theta: float, ctx: Context) -> Tensor:
        high = inverse_frequencies(dim, theta, ctx.positions.device)
        turns = self.original_max_positions * high / (2 * math.pi)  # within the original context
        smooth = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        smooth = smooth.clamp(0.0, 1.0)
        return (1 - smooth) * high / self.factor + smooth * high


@dataclass(frozen=True)
class Yarn:
    """`yarn`: interpolation of low frequencies only (Peng et al. 2023, arXiv 2309.00071)."""

    factor: float
    original_max_positions: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def frequencies(self, dim: int, theta: float, ctx: Context) -> Tensor:
        high = inverse_frequencies(dim, theta, ctx.positions.device)
        low_dim = self._dimension(self.beta_fast, dim, theta)
        high_dim = self._dimension(self.beta_slow, dim, theta)
        if self.truncate:
            low_dim, high_dim = math.floor(low_dim), math.ceil(high_dim)
        low_dim, high_dim = max(low_dim, 0), min(high_dim, dim - 1)
        width = (high_dim - low_dim) or 0.001  # the paper's ramp must not be infinitely steep
        ramp = (torch.arange(dim // 2, dtype=torch.float32, device=ctx.positions.device) - low_dim) / width
        kept = 1 - ramp.clamp(0.0, 1.0)
        return high / self.factor * (1 - kept) + high * kept

    def _dimension(self, turns: float, dim: int, theta: float) -> float:
        """Channel that makes `turns` full turns within the original context (section 3.2 of the paper)."""
        return dim * math.log(self.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))


@dataclass(frozen=True)
class LongRope:
    """`longrope`: a factor a channel, other ones for long records (Ding et al. 2024, arXiv 2402.13753)."""

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_positions: int
    attention_factor: float

    def frequencies(self, dim: int, theta: float, ctx: Context) -> Tensor:
        short, long = (
            torch.tensor(factors, dtype=torch.float32, device=ctx.positions.device)
            for factors in (self.short_factor, self.long_factor)
        )
        factors = torch.where(record_lengths(ctx) > self.original_max_positions, long, short)
        return inverse_frequencies(dim, theta, ctx.positions.device) / factors
