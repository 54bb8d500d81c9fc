"""Attention by torch's flex_attention: a block mask tells the kernel which blocks of scores it may skip.

Dong et al. 2024, arXiv 2412.05496.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from collie_core.ops.attention import PLAIN, Scores, sdpa
from collie_core.ops.context import Context


def flex(
    q: Tensor, k: Tensor, v: Tensor, ctx: Context, scale: float | None = None, scores: Scores = PLAIN
) -> Tensor:
    """flex_attention for whole passes without dropout, windows and softcap included; else `sdpa`."""
    length = q.shape[2]
    if length != k.shape[2] or scores.dropout:
        return sdpa(q, k, v, ctx, scale, scores)
    mask = block_mask(ctx, length, scores.window)

    def capped(score: Tensor, *_place: Tensor) -> Tensor:
        assert scores.softcap is not None
        return scores.softcap * torch.tanh(score / scores.softcap)

    run = flex_attention if torch.compiler.is_compiling() or not q.is_cuda else _compiled()
    out: Tensor = run(
        q,
        k,
        v,
        score_mod=None if scores.softcap is None else capped,
        block_mask=mask,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out


def block_mask(ctx: Context, length: int, window: int | None = None) -> BlockMask:
    """What `dense_mask` says, in blocks; made once a forward pass."""
    return ctx.memo(f"attention.block_mask.{window}", lambda: _make(ctx, length, window))


def _make(ctx: Context, length: int, window: int | None) -> BlockMask:
    segments, mask, prefix = ctx.segments, ctx.attention_mask, ctx.prefix

    def visible(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = key <= query
        if prefix is not None:
            seen = seen | prefix[row, key]
        if segments is not None:
            seen = seen & (segments[row, query] == segments[row, key])
        if mask is not None:
            seen = seen & mask[row, key]
        if window is not None:
            seen = seen & (query - key < window)
        return seen | (key == query)

    rows = ctx.input_ids.shape[0]
    return create_block_mask(visible, rows, None, length, length, device=ctx.input_ids.device)


@cache
def _compiled() -> Any:
    """flex_attention for blocks that are not compiled: as it stands it would hold all scores."""
    return torch.compile(flex_attention)
