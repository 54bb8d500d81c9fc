"""Which implementation of each operation a run uses: chosen once, when the model is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch

from collie_core.errors import ConfigError, nearest
from collie_core.ops.attention import Attention, cached
from collie_core.ops.attention_packages import installed
from collie_core.ops.cross_entropy import LinearCrossEntropy, SummedLoss, chunked, liger, plain
from collie_core.ops.implementations import ATTENTION, Prepare, fastest


@dataclass(frozen=True)
class Ops:
    """The chosen implementations; a provider's `build` hands them to its blocks.

    prepare: makes what all blocks share of a batch's context; made within a compiled block, it would make the
    graphs of blocks differ.
    """

    attention: Attention
    linear_cross_entropy: LinearCrossEntropy
    names: Mapping[str, str]
    prepare: Prepare

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
    dtype: torch.dtype | None = None,
    deterministic: bool = False,
) -> Ops:
    """The implementations by name; `auto` takes the fastest that the device has, and is never an error.

    use_flash: true demands FlashAttention, false forbids it.  dtype: of the weights; None: of 16 bits.
    deterministic: torch is told to be.
    Raises ConfigError for an unknown name, or for what the device or the installation cannot do.
    """
    check_names(attention, cross_entropy)
    device = torch.device(device)
    name = _choose_attention(attention, use_flash, device, dtype, deterministic)
    loss_name = "chunked" if cross_entropy == "auto" else cross_entropy
    if loss_name == "liger" and device.type != "cuda":
        raise ConfigError(f"ops.cross_entropy: liger needs a CUDA device, and this run is on {device}")
    chosen = ATTENTION[name]
    try:
        implementation = chosen.build()
    except (ImportError, OSError) as error:  # a package that was built for another torch
        raise ConfigError(f"ops.attention: {name} cannot be imported: {error}") from error
    return Ops(
        attention=cached(implementation),
        linear_cross_entropy=_LOSSES[loss_name],
        names={"attention": name, "packed_attention": chosen.packed, "cross_entropy": loss_name},
        prepare=chosen.prepare,
    )


def check_names(attention: str, cross_entropy: str) -> None:
    """Raise ConfigError for a name that is unknown, or one of a package that is not installed."""
    _known("ops.attention", attention, ATTENTION)
    _known("ops.cross_entropy", cross_entropy, _LOSSES)
    if attention != "auto" and ATTENTION[attention].missing():
        raise ConfigError(f"ops.attention: {attention} {ATTENTION[attention].missing()}")
    if cross_entropy == "liger" and not installed("liger-kernel"):
        raise ConfigError("ops.cross_entropy: liger needs the package liger-kernel, which is not installed")


_LOSSES: dict[str, LinearCrossEntropy] = {"chunked": chunked, "plain": plain, "liger": liger}


def _choose_attention(
    name: str,
    use_flash: bool | Literal["auto"],
    device: torch.device,
    dtype: torch.dtype | None,
    deterministic: bool,
) -> str:
    if use_flash is True:
        problem = ATTENTION["flash"].problem(device, dtype, deterministic)
        if problem:
            raise ConfigError(f"use_flash: true, but FlashAttention {problem}; use auto or false")
        if name != "auto" and not ATTENTION[name].flash:
            raise ConfigError(f"use_flash: true, but ops.attention: {name} does not use FlashAttention")
    if name == "auto" or (name == "sdpa" and use_flash is False):
        return fastest(device, dtype, use_flash is not False, deterministic)
    if use_flash is False and ATTENTION[name].half:
        raise ConfigError(f"use_flash: false, but ops.attention: {name} uses FlashAttention")
    problem = ATTENTION[name].problem(device, dtype, deterministic)
    if problem:
        raise ConfigError(f"ops.attention: {name} {problem}")
    return name


def _known(key: str, name: str, known: Mapping[str, object]) -> None:
    if name != "auto" and name not in known:
        names = ", ".join(["auto", *known])
        raise ConfigError(f"{key}: unknown implementation {name!r}{nearest(name, known)} (known: {names})")
