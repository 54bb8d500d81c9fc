"""The ways of putting attention and MLP around the residual stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from collie_models.decoder.config import DecoderConfig
from collie_models.decoder.layers import Attention, make_mlp, make_norm

if TYPE_CHECKING:
    from collie_core.ops import Context, Ops


class SequentialBlock(nn.Module):
    """h + attention(norm(h)), and then h + mlp(norm(h)) (LLaMA)."""

    def __init__(self, config: DecoderConfig, ops: Ops) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, ops)
        self.mlp_norm = make_norm(config)
        self.mlp = make_mlp(config)

    def forward(self, h: Tensor, ctx: Context) -> Tensor:
        """h (B, S, E) -> (B, S, E)."""
        h = h + self.attention(self.attention_norm(h), ctx)
        out: Tensor = h + self.mlp(self.mlp_norm(h))
        return out


class NormedBlock(SequentialBlock):
    """a = norm(h); m = norm(scale a + attention(a)); scale m + mlp(m) (ChatGLM)."""

    def __init__(self, config: DecoderConfig, ops: Ops) -> None:
        super().__init__(config, ops)
        self.scale = config.residual_scale

    def forward(self, h: Tensor, ctx: Context) -> Tensor:
        """h (B, S, E) -> (B, S, E)."""
        a = self.attention_norm(h)
        m = self.mlp_norm(self.scale * a + self.attention(a, ctx))
        out: Tensor = self.scale * m + self.mlp(m)
        return out


class ParallelBlock(nn.Module):
    """h + attention(x) + mlp(x), where x = norm(h) (GPT-J, MOSS)."""

    def __init__(self, config: DecoderConfig, ops: Ops) -> None:
        super().__init__()
        self.norm = make_norm(config)
        self.attention = Attention(config, ops)
        self.mlp = make_mlp(config)

    def forward(self, h: Tensor, ctx: Context) -> Tensor:
        """h (B, S, E) -> (B, S, E)."""
        x = self.norm(h)
        out: Tensor = h + self.attention(x, ctx) + self.mlp(x)
        return out


BLOCKS: Mapping[str, type[SequentialBlock | ParallelBlock]] = {
    "sequential": SequentialBlock,
    "parallel": ParallelBlock,
    "normed": NormedBlock,
}
