"""Attention by the packages flash-attn (2 or 3) and flash-attn-4, where they are installed.

FlashAttention-2: Dao 2023, arXiv 2307.08691.  FlashAttention-3: Shah et al. 2024, arXiv 2407.08608.
"""

from __future__ import annotations

import importlib
import importlib.util
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from collie_core.ops.attention_records import Kernel, flat
from collie_core.ops.context import Records


def installed(package: str) -> str:
    """The version of a distribution; empty where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def flash_attn() -> Kernel:
    """FlashAttention-3 on Hopper where it is installed, else FlashAttention-2.

    Raises ImportError where the package does not fit this torch.
    """
    if importlib.util.find_spec("flash_attn_interface") and torch.cuda.get_device_capability()[0] == 9:
        module: Any = importlib.import_module("flash_attn_interface")
    else:
        module = importlib.import_module("flash_attn")
    return of_module(module)


def of_module(module: Any) -> Kernel:
    """The kernel in a module with the functions of flash-attn, which 2 and 3 name and call alike."""
    rows, packed = module.flash_attn_func, module.flash_attn_varlen_func

    def kernel(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        records: Records | None,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        how = {
            "softmax_scale": scale,
            "causal": True,
            "window_size": (-1 if window is None else window - 1, 0),
            "softcap": softcap or 0.0,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }
        if records is None:
            return _output(rows(q, k, v, **how))
        starts, longest = records.starts, records.longest
        out = packed(flat(q), flat(k), flat(v), starts, starts, longest, longest, **how)
        return _output(out).view(q.shape)

    return kernel


def _output(found: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The output; early versions of 3 give the logarithms of the sums too."""
    return found[0] if isinstance(found, tuple) else found


def flash_attn_4() -> Kernel:
    """The kernel of flash-attn-4 (`flash_attn.cute`), which compiles itself for each kind of input.

    Raises ImportError where the package does not fit this torch or CUDA.
    """
    importlib.import_module("flash_attn.cute.interface")
    return _fourth


def _fourth(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    records: Records | None,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    left = -1 if window is None else window - 1
    if records is None:
        return _forward_4(q, k, v, None, 0, scale, left, softcap or 0.0)[0]
    starts, longest = records.starts, records.longest
    out = _forward_4(flat(q), flat(k), flat(v), starts, longest, scale, left, softcap or 0.0)[0]
    return out.view(q.shape)


# An operator, so that torch.compile does not look into it.  The functions with an underscore give the sums
# that the backward pass needs; torch's own adapter for the package calls them too.
@torch.library.custom_op("collie::flash_attention_4", mutates_args=())
def _forward_4(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor | None,
    longest: int,
    scale: float,
    left: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """(output, logarithms of the sums): (B, S, H, D), (B, H, S), or with starts (T, H, D), (H, T)."""
    module: Any = importlib.import_module("flash_attn.cute.interface")
    with torch.no_grad():
        out, sums, *_ = module._flash_attn_fwd(
            q,
            k,
            v,
            **_how_4(starts, longest, scale, left),
            softcap=softcap or None,
            return_lse=True,
        )
    return out.contiguous(), sums.contiguous()


def _how_4(starts: Tensor | None, longest: int, scale: float, left: int) -> dict[str, Any]:
    """What both passes are told of scores and records."""
    windowed = left >= 0
    how: dict[str, Any] = {
        "softmax_scale": scale,
        "causal": not windowed,
        "window_size_left": left if windowed else None,
        "window_size_right": 0 if windowed else None,
    }
    if starts is not None:
        for side in "qk":
            how |= {f"cu_seqlens_{side}": starts, f"max_seqlen_{side}": longest}
    return how


@_forward_4.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor | None,
    longest: int,
    scale: float,
    left: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    heads = q.shape[-2]
    shape = (heads, q.shape[0]) if starts is not None else (q.shape[0], heads, q.shape[1])
    return q.new_empty(q.shape), q.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("collie::flash_attention_4_backward", mutates_args=())
def _backward_4(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Tensor,
    starts: Tensor | None,
    longest: int,
    scale: float,
    left: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    module: Any = importlib.import_module("flash_attn.cute.interface")
    dq, dk, dv, *_ = module._flash_attn_bwd(
        q,
        k,
        v,
        out,
        gradient.contiguous(),
        sums,
        **_how_4(starts, longest, scale, left),
        softcap=softcap,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@_backward_4.register_fake
def _(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Tensor,
    starts: Tensor | None,
    longest: int,
    scale: float,
    left: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, starts, *how = inputs
    ctx.how = how
    ctx.save_for_backward(q, k, v, *output, starts)


def _gradients(ctx: Any, gradient: Tensor, _of_sums: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, out, sums, starts = ctx.saved_tensors
    dq, dk, dv = _backward_4(gradient, q, k, v, out, sums, starts, *ctx.how)
    return dq, dk, dv, None, None, None, None, None


_forward_4.register_autograd(_gradients, setup_context=_keep)
