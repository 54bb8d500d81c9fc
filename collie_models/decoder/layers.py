"""The parts of a block: attention, the two kinds of MLP, norms and activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from collie_core.plugin import Scores
from collie_models.decoder.config import DecoderConfig
from collie_models.decoder.rotary import Rotary

if TYPE_CHECKING:
    from collie_core.ops import Context, Ops

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def make_norm(config: DecoderConfig) -> nn.Module:
    """RMSNorm or LayerNorm over the hidden width; both compute in fp32 and give back the input's dtype."""
    kind = nn.RMSNorm if config.norm == "rms" else nn.LayerNorm
    return kind(config.hidden_size, eps=config.norm_eps)


class Attention(nn.Module):
    """Multi-head, grouped-query or multi-query attention with rotary positions.

    Queries, keys, values and output have a parameter each, so that each is cut by heads without rearranging.
    """

    def __init__(self, config: DecoderConfig, ops: Ops) -> None:
        super().__init__()
        self.head_dim, self.rotary, self.attend = config.head_dim, config.rotary, ops.attention
        self.scores = Scores(window=config.window)
        self.late_rotation = config.late_rotation
        q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_width, config.hidden_size, bias=config.attention_output_bias)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """x (B, S, E) -> (B, S, E)."""
        # -1 heads, not the config's: under tensor parallelism a rank has fewer
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = self.rotary.angles(ctx)
        q = self.rotary.rotate(q, cos, sin)
        if self.late_rotation and ctx.cache is not None and isinstance(self.rotary, Rotary):
            k, v = ctx.cache.append(k, v)
            ctx = replace(ctx, cache=None)
            cos, sin = self.rotary.key_angles(ctx)
        k = self.rotary.rotate(k, cos, sin)
        out: Tensor = self.o_proj(self.attend(q, k, v, ctx, scores=self.scores).transpose(1, 2).flatten(2))
        return out


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.activation = ACTIVATIONS[config.activation]
        self.gate_proj = nn.Linear(hidden, inner, bias=config.mlp_bias)
        self.up_proj = nn.Linear(hidden, inner, bias=config.mlp_bias)
        self.down_proj = nn.Linear(inner, hidden, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, S, E) -> (B, S, E)."""
        out: Tensor = self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        return out


class PlainMLP(nn.Module):
    """down(activation(up(x)))."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, S, E) -> (B, S, E)."""
        out: Tensor = self.down_proj(self.activation(self.up_proj(x)))
        return out


def make_mlp(config: DecoderConfig) -> nn.Module:
    """The MLP that the config asks for."""
    return GatedMLP(config) if config.gated_mlp else PlainMLP(config)
