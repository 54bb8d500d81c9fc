"""Causal attention.  It alone knows packing, padding, prefixes and caches; blocks only call it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from collie_core.ops.context import Context


@dataclass(frozen=True)
class Scores:
    """How scores become weights, where a model departs from the softmax of what is visible.

    window: a query sees itself and the window - 1 positions before it (Beltagy et al. 2020, arXiv
    2004.05150).  softcap: scores become c tanh(score / c) (Gemma 2, arXiv 2408.00118, section 2).
    dropout: the share of weights that is dropped, the others being scaled up.
    """

    window: int | None = None
    softcap: float | None = None
    dropout: float = 0.0


PLAIN = Scores()
#: Not cuDNN: with a mask its gradient of the queries is wrong for lengths of 128 n + 64 (seen with torch 2.11
#: on an H200, and https://github.com/pytorch/pytorch/issues/196678).
_TAKES_MASKS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Attention(Protocol):
    """An implementation: q (B, H, S, D), k and v (B, H_kv, K, D) -> (B, H, S, D), in the dtype of q.

    H is a multiple of H_kv: query head h uses key-value head h // (H / H_kv).  The queries are the last S
    of the K positions.  scale multiplies the scores; None means 1 / sqrt(D).
    """

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        ctx: Context,
        scale: float | None = None,
        scores: Scores = PLAIN,
    ) -> Tensor: ...


def cached(implementation: Attention) -> Attention:
    """`implementation` on the new keys and values together with those in `ctx.cache`, if there is one."""

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        ctx: Context,
        scale: float | None = None,
        scores: Scores = PLAIN,
    ) -> Tensor:
        if ctx.cache is not None:
            k, v = ctx.cache.append(k, v)
        return implementation(q, k, v, ctx, scale, scores)

    return attention


def reference(
    q: Tensor, k: Tensor, v: Tensor, ctx: Context, scale: float | None = None, scores: Scores = PLAIN
) -> Tensor:
    """Softmax of scaled scores, in fp32 (Vaswani et al. 2017, eq. 1): the oracle of the others."""
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    raw = (q.float() @ k.float().transpose(-1, -2)) * scale
    if scores.softcap is not None:
        raw = scores.softcap * torch.tanh(raw / scores.softcap)
    visible = dense_mask(ctx, q.shape[2], k.shape[2], scores.window)
    weights = F.dropout(raw.masked_fill(~visible, -torch.inf).softmax(-1), scores.dropout)
    return (weights @ v.float()).to(q.dtype)


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, ctx: Context, scale: float | None = None, scores: Scores = PLAIN
) -> Tensor:
    """torch's fused attention.  No mask is made where causality alone decides (no packing, no padding)."""
    if scores.softcap is not None:  # which no fused kernel of torch computes
        return reference(q, k, v, ctx, scale, scores)
    queries, keys = q.shape[2], k.shape[2]
    window = scores.window if scores.window is not None and scores.window < keys else None
    grouped = q.shape[1] != k.shape[1]
    causal = only_causal(ctx) and window is None and (queries == 1 or queries == keys)
    if grouped and q.is_cuda and (not causal or q.dtype == torch.float32):
        # grouped heads are taken by FlashAttention and cuDNN alone, which take no mask and no fp32
        k, v, grouped = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1]), False
    dropout = scores.dropout
    if causal and queries == 1:  # it sees every key
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale, enable_gqa=grouped)
    if causal:
        return F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=grouped
        )
    mask = dense_mask(ctx, queries, keys, window)
    with sdpa_kernel(_TAKES_MASKS):
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=grouped
        )


def dense_mask(ctx: Context, queries: int, keys: int, window: int | None = None) -> Tensor:
    """Which key each query sees: bool (B or 1, 1, queries, keys), made once a forward pass.

    A query sees earlier positions and prefixes of its own record, but no padding.  Every query sees itself:
    the softmax of a padding row must not be empty, or its NaN would reach the weights in the backward pass.
    """
    if window is None:
        return ctx.memo("attention.dense_mask", lambda: _make_dense_mask(ctx, queries, keys))
    return ctx.memo(
        f"attention.dense_mask.{window}",
        lambda: dense_mask(ctx, queries, keys) & _within(window, queries, keys, ctx.input_ids.device),
    )


def _within(window: int, queries: int, keys: int, device: torch.device) -> Tensor:
    """bool (queries, keys): the key is less than `window` positions before the query."""
    key = torch.arange(keys, device=device)
    return key[keys - queries :, None] - key < window


def _make_dense_mask(ctx: Context, queries: int, keys: int) -> Tensor:
    key = torch.arange(keys, device=ctx.input_ids.device)
    query = key[keys - queries :, None]
    visible = (key <= query).unsqueeze(0)
    if ctx.prefix is not None:
        visible = visible | ctx.prefix[:, None, :]
    if ctx.segments is not None:
        visible = visible & (ctx.segments[:, :, None] == ctx.segments[:, None, :])
    if ctx.attention_mask is not None:
        visible = visible & ctx.attention_mask[:, None, :]
    return (visible | (key == query)).unsqueeze(1)


def only_causal(ctx: Context) -> bool:
    """Whether a query sees every earlier position and nothing else."""
    return ctx.segments is None and ctx.attention_mask is None and ctx.prefix is None


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """(B, H_kv, K, D) -> (B, heads, K, D), each head `heads / H_kv` times."""
    if x.shape[1] == heads:
        return x
    return x.unsqueeze(2).expand(-1, -1, heads // x.shape[1], -1, -1).flatten(1, 2)
