"""The implementations of attention by name: what each needs, and what it does with packed rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend

from collie_core.ops import attention_packages as packages
from collie_core.ops.attention import Attention, dense_mask, reference, sdpa
from collie_core.ops.attention_records import HALF, by_kernel, in_order, varlen, without_flash
from collie_core.ops.context import Context

Prepare = Callable[[Context], None]


@dataclass(frozen=True)
class Implementation:
    """How attention is computed.

    build: the function.  packed: what computes packed rows.  flash: it is FlashAttention.  cuda: it needs
    CUDA.  half: it takes bf16 and fp16 alone, from compute capability 8.0 on.  packages: the distributions
    that may have it; none: torch.  repeatable: its backward pass can be deterministic.
    """

    build: Callable[[], Attention]
    packed: str = "mask"
    flash: bool = False
    cuda: bool = False
    half: bool = False
    packages: tuple[str, ...] = ()
    repeatable: bool = True

    @property
    def prepare(self) -> Prepare:
        """What to call with the context of a batch before its first block."""
        return {"mask": _make_mask, "block mask": _make_block_mask}.get(
            self.packed, _make_mask_if_needed
        )

    def missing(self) -> str:
        """The package that it lacks, for a message; else empty."""
        if not self.packages or any(packages.installed(package) for package in self.packages):
            return ""
        return f"needs the package {' or '.join(self.packages)}, which is not installed"

    def problem(self, device: torch.device, dtype: torch.dtype | None, deterministic: bool) -> str:
        """Why it cannot be used, for a message; else empty.  dtype: of the weights; None: of 16 bits."""
        if self.missing():
            return self.missing()
        if (self.cuda or self.half) and device.type != "cuda":
            return f"needs a CUDA device, and this run is on {device}"
        if self.half and dtype is not None and dtype not in HALF:
            return (
                f"computes in bfloat16 and float16, and the weights are {str(dtype).removeprefix('torch.')}"
            )
        if self.half and torch.cuda.get_device_capability(device) < (8, 0):
            major, minor = torch.cuda.get_device_capability(device)
            return f"needs compute capability 8.0, and {device} has {major}.{minor}"
        if deterministic and not self.repeatable:
            return "has no deterministic backward pass, which train.deterministic asks for"
        return ""


def _cudnn() -> Attention:
    """cuDNN takes no records; where it does not serve, FlashAttention does."""
    order = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
    return by_kernel(varlen(), in_order(*order, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH))


def _flash() -> Attention:
    rows = in_order(SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
    return by_kernel(varlen(), rows)


def _flex() -> Attention:
    from collie_core.ops.attention_flex import flex  # its import takes half a second

    return flex


ATTENTION: Mapping[str, Implementation] = {
    "sdpa": Implementation(lambda: sdpa, flash=True),
    "sdpa_without_flash": Implementation(lambda: without_flash),
    "cudnn": Implementation(_cudnn, "varlen", flash=True, half=True, repeatable=False),
    "flash": Implementation(_flash, "varlen", flash=True, half=True),
    "varlen": Implementation(lambda: by_kernel(varlen()), "varlen", flash=True, half=True),
    "flash_attn": Implementation(
        lambda: by_kernel(packages.flash_attn(), softcap=True),
        "flash_attn",
        flash=True,
        half=True,
        packages=("flash-attn", "flash-attn-3"),
    ),
    "flash_attn_4": Implementation(
        lambda: by_kernel(packages.flash_attn_4(), softcap=True),
        "flash_attn_4",
        flash=True,
        half=True,
        packages=("flash-attn-4",),
    ),
    "flex": Implementation(_flex, "block mask", cuda=True),
    "reference": Implementation(lambda: reference),
}


def fastest(device: torch.device, dtype: torch.dtype | None, flash: bool, deterministic: bool) -> str:
    """What `auto` takes; docs/performance.md has the figures.  flash: whether FlashAttention may be used."""
    if device.type != "cuda":
        return "sdpa"
    if not flash:
        return "sdpa_without_flash"
    for name in ("cudnn", "flash"):
        if name == "cudnn" and torch.cuda.get_device_capability(device) < (9, 0):
            continue  # before Hopper it is the slower one
        if not ATTENTION[name].problem(device, dtype, deterministic):
            return name
    return "sdpa"


def _make_mask(ctx: Context) -> None:
    if ctx.segments is not None or ctx.attention_mask is not None or ctx.prefix is not None:
        length = ctx.input_ids.shape[1]
        dense_mask(ctx, length, length)


def _make_mask_if_needed(ctx: Context) -> None:
    if ctx.records is None or ctx.prefix is not None:
        _make_mask(ctx)


def _make_block_mask(ctx: Context) -> None:
    from collie_core.ops.attention_flex import block_mask

    block_mask(ctx, ctx.input_ids.shape[1])
