"""Attention by kernels that know where records begin: packed rows and windows need no mask."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from collie_core.ops.attention import PLAIN, Attention, Scores, only_causal, repeat_heads, sdpa
from collie_core.ops.context import Context, Records

HALF = (torch.bfloat16, torch.float16)


class Kernel(Protocol):
    """Causal attention within each record: q (B, S, H, D), k and v (B, S, H_kv, D) -> (B, S, H, D).

    records: None where every row is one.  window, softcap: see `Scores`; None: there is none.
    """

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        records: Records | None,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor: ...


def by_kernel(kernel: Kernel, rows: Attention | None = None, softcap: bool = False) -> Attention:
    """`kernel` where it serves; `rows` where every row is one record and nothing else is asked; else `sdpa`.

    rows: None: `kernel` computes these too.  softcap: `kernel` knows it.
    The kernels are of CUDA; they take bf16 and fp16, heads of at most 256 channels, a multiple of 8, and
    neither padding on the left, prefixes, dropout nor a cache.
    """

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        ctx: Context,
        scale: float | None = None,
        scores: Scores = PLAIN,
    ) -> Tensor:
        whole, width = q.shape[2] == k.shape[2], q.shape[3]
        if rows is not None and only_causal(ctx) and whole and scores.window is scores.softcap is None:
            return rows(q, k, v, ctx, scale, scores)
        if (
            not whole
            or ctx.attention_mask is not None
            or ctx.prefix is not None
            or (ctx.segments is not None and ctx.records is None)
            or (scores.softcap is not None and not softcap)
            or scores.dropout
            or width % 8
            or width > 256
            or q.dtype not in HALF
            or not q.is_cuda
        ):
            return sdpa(q, k, v, ctx, scale, scores)
        scale = width**-0.5 if scale is None else scale
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return kernel(q, k, v, ctx.records, scale, scores.window, scores.softcap).transpose(1, 2)

    return attention


def in_order(*kernels: SDPBackend) -> Attention:
    """`sdpa` by the first of `kernels` that serves, and by no other."""
    order = list(kernels)

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        ctx: Context,
        scale: float | None = None,
        scores: Scores = PLAIN,
    ) -> Tensor:
        with sdpa_kernel(order, set_priority=True):
            return sdpa(q, k, v, ctx, scale, scores)

    return attention


def without_flash(
    q: Tensor, k: Tensor, v: Tensor, ctx: Context, scale: float | None = None, scores: Scores = PLAIN
) -> Tensor:
    """`sdpa` on CUDA with every kernel but FlashAttention and cuDNN."""
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return sdpa(q, k, v, ctx, scale, scores)


def flat(x: Tensor) -> Tensor:
    """(B, S, H, D) -> (B * S, H, D)."""
    return x.flatten(0, 1)


def varlen() -> Kernel:
    """torch's own kernel for records of different lengths, FlashAttention-2.

    It is an operator to torch.compile, and deterministic where torch is told to be.
    """
    from torch.nn.attention.varlen import varlen_attn

    # grouped heads are taken by the kernel of every torch >= 2.11, and asked for since a later one
    grouping: dict[str, Any] = (
        {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    )
    call: Callable[..., Any] = varlen_attn

    def kernel(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        records: Records | None,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        if records is None:
            rows, length = q.shape[:2]
            starts = torch.arange(rows + 1, device=q.device, dtype=torch.int32) * length
        else:
            starts, length = records.starts, records.longest
        out: Tensor = call(
            flat(q),
            flat(k),
            flat(v),
            starts,
            starts,
            length,
            length,
            scale=scale,
            window_size=(-1 if window is None else window - 1, 0),
            **grouping,
        )
        return out.view(q.shape)

    return kernel
