"""Acme's decoder: learned positions, LayerNorm, multi-query attention, squared ReLU, tied embeddings."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from collie_core.plugin import Context, Ops


@dataclass(frozen=True)
class AcmeConfig:
    """Sizes of the model; `max_positions` bounds the length of a record."""

    vocab_size: int
    width: int
    depth: int
    heads: int
    max_positions: int


class Block(nn.Module):
    """h + attention(norm(h)), then h + mlp(norm(h)); h is (B, S, width)."""

    def __init__(self, config: AcmeConfig, ops: Ops) -> None:
        super().__init__()
        self.ops, self.heads = ops, config.heads
        head_width = config.width // config.heads
        self.attention_norm = nn.LayerNorm(config.width)
        self.q_proj = nn.Linear(config.width, config.width)
        self.k_proj = nn.Linear(config.width, head_width)
        self.v_proj = nn.Linear(config.width, head_width)
        self.o_proj = nn.Linear(config.width, config.width)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.up_proj = nn.Linear(config.width, 4 * config.width)
        self.down_proj = nn.Linear(4 * config.width, config.width)

    def forward(self, h: Tensor, ctx: Context) -> Tensor:
        x = self.attention_norm(h)
        q = self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.k_proj(x).unsqueeze(1), self.v_proj(x).unsqueeze(1)  # one head for all queries
        mixed = self.ops.attention(q, k, v, ctx)  # knows packed records, padding and caches
        h = h + self.o_proj(mixed.transpose(1, 2).flatten(2))
        return h + self.down_proj(F.relu(self.up_proj(self.mlp_norm(h))).square())


class Embedding(nn.Module):
    """(B, S) ids -> (B, S, width); ctx.positions restart at each record of a packed row."""

    def __init__(self, config: AcmeConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.max_positions, config.width)

    def forward(self, input_ids: Tensor, ctx: Context) -> Tensor:
        h: Tensor = self.tokens(input_ids) + self.positions(ctx.positions)
        return h


class Head(nn.Module):
    """(..., width) -> logits (..., vocab_size), with the embedding's weight."""

    def __init__(self, config: AcmeConfig, weight: Tensor) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.weight = weight

    def forward(self, h: Tensor, ctx: Context) -> Tensor:
        return F.linear(self.norm(h), self.weight)


class AcmeDecoder(nn.Module):
    """embed, blocks and head: the three parts that the engine runs."""

    def __init__(self, config: AcmeConfig, ops: Ops) -> None:
        super().__init__()
        self.embed = Embedding(config)
        self.blocks = nn.ModuleDict({str(index): Block(config, ops) for index in range(config.depth)})
        self.head = Head(config, self.embed.tokens.weight)
