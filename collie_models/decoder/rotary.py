"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), computed in fp32 once a forward pass."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from collie_models.decoder.rope_scaling import Scaling, Unscaled

if TYPE_CHECKING:
    from collie_core.ops import Context


class AnyRotary(Protocol):
    """How queries and keys are turned by their positions."""

    def angles(self, ctx: Context) -> tuple[Tensor, Tensor]:
        """Cosine and sine in fp32 for `rotate`, shared by all blocks of a forward pass."""

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, H, S, head width) rotated in fp32 and cast back."""


@dataclass(frozen=True)
class Rotary:
    """Rotates the first `dim` channels of each head; the rest passes through.

    interleaved: pairs are channels (2i, 2i + 1), as in GPT-J; else (i, i + dim / 2), as in LLaMA.
    """

    dim: int
    theta: float = 10000.0
    interleaved: bool = False
    scaling: Scaling = Unscaled()

    def angles(self, ctx: Context) -> tuple[Tensor, Tensor]:
        """Cosine and sine, fp32 (B or 1, 1, S, dim / 2), shared by all blocks of a forward pass."""
        return ctx.memo("decoder.rotary", lambda: self._angles(ctx))

    def key_angles(self, ctx: Context) -> tuple[Tensor, Tensor]:
        """The same for all keys, those in a cache too, with the frequencies that hold by now."""
        if ctx.key_positions is None:
            return self.angles(ctx)
        keys = replace(ctx, positions=ctx.key_positions)
        return ctx.memo("decoder.rotary.keys", lambda: self._angles(keys))

    def _angles(self, ctx: Context) -> tuple[Tensor, Tensor]:
        frequencies = self.scaling.frequencies(self.dim, self.theta, ctx)
        angles = ctx.positions.unsqueeze(-1).float() * frequencies
        factor = self.scaling.attention_factor
        return angles.cos().unsqueeze(1) * factor, angles.sin().unsqueeze(1) * factor

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, H, S, head width) rotated in fp32 and cast back."""
        rotated, rest = x[..., : self.dim].float(), x[..., self.dim :]
        if self.interleaved:
            first, second = rotated.unflatten(-1, (-1, 2)).unbind(-1)
        else:
            first, second = rotated.chunk(2, dim=-1)
        turned = (first * cos - second * sin, second * cos + first * sin)
        joined = torch.stack(turned, -1).flatten(-2) if self.interleaved else torch.cat(turned, -1)
        joined = joined.to(x.dtype)
        return joined if rest.shape[-1] == 0 else torch.cat((joined, rest), -1)


@dataclass(frozen=True)
class Rotary2D:
    """Rotates each half of the `dim` channels of a head by a position of its own (GLM, arXiv 2103.10360).

    Within a half of width w the pairs are channels (i, i + w / 2).
    """

    dim: int
    theta: float = 10000.0
    scaling: Scaling = Unscaled()

    def angles(self, ctx: Context) -> tuple[Tensor, Tensor]:
        """Cosine and sine, fp32 (B, 1, S, 2, dim / 4), of positions (B, 2, S)."""
        return ctx.memo("decoder.rotary", lambda: self._angles(ctx))

    def _angles(self, ctx: Context) -> tuple[Tensor, Tensor]:
        frequencies = self.scaling.frequencies(self.dim // 2, self.theta, ctx)
        angles = ctx.positions.transpose(1, 2).unsqueeze(-1).float() * frequencies
        return angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, H, S, dim) rotated in fp32 and cast back."""
        first, second = x.float().unflatten(-1, (2, 2, -1)).unbind(-2)
        turned = (first * cos - second * sin, second * cos + first * sin)
        return torch.stack(turned, -2).flatten(-3).to(x.dtype)
