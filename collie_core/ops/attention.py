"""Causal attention.  It alone knows packing, padding, prefixes and caches; blocks only call it."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from collie_core.ops.context import Context


class Attention(Protocol):
    """An implementation: q (B, H, S, D), k and v (B, H_kv, K, D) -> (B, H, S, D), in the dtype of q.

    H is a multiple of H_kv: query head h uses key-value head h // (H / H_kv).  The queries are the last S
    of the K positions.  scale multiplies the scores; None means 1 / sqrt(D).
    """

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, scale: float | None = None
    ) -> Tensor: ...


def cached(implementation: Attention) -> Attention:
    """`implementation` on the new keys and values together with those in `ctx.cache`, if there is one."""

    def attention(q: Tensor, k: Tensor, v: Tensor, ctx: Context, scale: float | None = None) -> Tensor:
        if ctx.cache is not None:
            k, v = ctx.cache.append(k, v)
        return implementation(q, k, v, ctx, scale)

    return attention


def reference(q: Tensor, k: Tensor, v: Tensor, ctx: Context, scale: float | None = None) -> Tensor:
    """Softmax of scaled scores, in fp32 (Vaswani et al. 2017, eq. 1): the oracle of the others."""
    k, v = _repeat_heads(k, q.shape[1]), _repeat_heads(v, q.shape[1])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q.float() @ k.float().transpose(-1, -2)) * scale
    visible = dense_mask(ctx, q.shape[2], k.shape[2])
    return (scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v.float()).to(q.dtype)


def sdpa(q: Tensor, k: Tensor, v: Tensor, ctx: Context, scale: float | None = None) -> Tensor:
    """torch's fused attention.  No mask is made where causality alone decides (no packing, no padding)."""
    queries, keys = q.shape[2], k.shape[2]
    grouped = q.shape[1] != k.shape[1]
    causal = _only_causal(ctx) and (queries == 1 or queries == keys)
    if grouped and q.is_cuda and (not causal or q.dtype == torch.float32):
        # grouped heads are taken by FlashAttention and cuDNN alone, which take no mask and no fp32
        k, v, grouped = _repeat_heads(k, q.shape[1]), _repeat_heads(v, q.shape[1]), False
    if causal and queries == 1:  # it sees every key
        return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)
    if causal:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    mask = dense_mask(ctx, queries, keys)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)


def sdpa_without_flash(q: Tensor, k: Tensor, v: Tensor, ctx: Context, scale: float | None = None) -> Tensor:
    """`sdpa` on CUDA with every kernel but FlashAttention and cuDNN."""
    k, v = _repeat_heads(k, q.shape[1]), _repeat_heads(v, q.shape[1])
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return sdpa(q, k, v, ctx, scale)


#: Implementations by the name that `ops.attention` says.
IMPLEMENTATIONS: dict[str, Attention] = {
    "sdpa": sdpa,
    "sdpa_without_flash": sdpa_without_flash,
    "reference": reference,
}


def dense_mask(ctx: Context, queries: int, keys: int) -> Tensor:
    """Which key each query sees: bool (B or 1, 1, queries, keys), made once a forward pass.

    A query sees earlier positions and prefixes of its own record, but no padding.  Every query sees itself:
    the softmax of a padding row must not be empty, or its NaN would reach the weights in the backward pass.
    """
    return ctx.memo("attention.dense_mask", lambda: _make_dense_mask(ctx, queries, keys))


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


def _only_causal(ctx: Context) -> bool:
    return ctx.segments is None and ctx.attention_mask is None and ctx.prefix is None


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    """(B, H_kv, K, D) -> (B, heads, K, D), each head `heads / H_kv` times."""
    if x.shape[1] == heads:
        return x
    return x.unsqueeze(2).expand(-1, -1, heads // x.shape[1], -1, -1).flatten(1, 2)
