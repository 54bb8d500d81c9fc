"""Which implementation of each operation a run uses: chosen once, when the model is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch

from collie_core.errors import ConfigError, nearest
from collie_core.ops.attention import IMPLEMENTATIONS, Attention, cached
from collie_core.ops.cross_entropy import LinearCrossEntropy, SummedLoss, chunked, plain


@dataclass(frozen=True)
class Ops:
    """The chosen implementations; a provider's `build` hands them to its blocks."""

    attention: Attention
    linear_cross_entropy: LinearCrossEntropy
    names: Mapping[str, str]

    def describe(self) -> dict[str, str]:
        """Operation -> implementation, for run.json."""
        return dict(self.names)

    def for_vocabulary(self, loss: SummedLoss, width: int) -> Ops:
        """The same for a head that gives a part of the words, `width` at most: `loss` of its logits."""
        return replace(self, linear_cross_entropy=partial(self.linear_cross_entropy, loss=loss, width=width))


def select_ops(
    attention: str = "auto",
    cross_entropy: str = "auto",
    use_flash: bool | Literal["auto"] = "auto",
    device: torch.device | str = "cpu",
) -> Ops:
    """The implementations by name; `auto` takes the fastest that the device has.

    use_flash: true demands FlashAttention, false forbids it.
    Raises ConfigError for an unknown name, or for what the device cannot do.
    """
    device = torch.device(device)
    attention_name = _choose_attention(attention, use_flash, device)
    loss_name = _known("ops.cross_entropy", cross_entropy, _LOSSES)
    if loss_name == "auto":
        loss_name = "chunked"
    return Ops(
        attention=cached(IMPLEMENTATIONS[attention_name]),
        linear_cross_entropy=_LOSSES[loss_name],
        names={"attention": attention_name, "cross_entropy": loss_name},
    )


_LOSSES: dict[str, LinearCrossEntropy] = {"chunked": chunked, "plain": plain}


def _choose_attention(name: str, use_flash: bool | Literal["auto"], device: torch.device) -> str:
    name = _known("ops.attention", name, IMPLEMENTATIONS)
    if use_flash is True:
        problem = _no_flash(device)
        if problem:
            raise ConfigError(f"use_flash: true, but {problem}; use auto or false")
        if name not in ("auto", "sdpa"):
            raise ConfigError(f"use_flash: true, but ops.attention: {name} does not use FlashAttention")
    if name not in ("auto", "sdpa"):
        return name
    return "sdpa_without_flash" if use_flash is False and device.type == "cuda" else "sdpa"


def _no_flash(device: torch.device) -> str:
    if device.type != "cuda":
        return f"FlashAttention needs a CUDA device, and this run is on {device}"
    major, minor = torch.cuda.get_device_capability(device)
    return "" if major >= 8 else f"FlashAttention needs compute capability 8.0, {device} has {major}.{minor}"


def _known(key: str, name: str, known: Mapping[str, object]) -> str:
    if name != "auto" and name not in known:
        names = ", ".join(["auto", *known])
        raise ConfigError(f"{key}: unknown implementation {name!r}{nearest(name, known)} (known: {names})")
    return name
