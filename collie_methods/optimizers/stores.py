"""How the states of a parameter's elements are kept between steps: fp32, bf16 or 8 bit.

They are always computed in fp32.  Rounding to less is stochastic: a moving mean whose change is below half of
the last bit would else stand still.  The noise is a function of seed, step, name and global index, so copies
on several ranks stay equal, and a box of a parameter holds what the whole would hold there.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from collie_core.ops.rounding import Noise, round_to, uniform
from collie_core.shard import Piece, Shard

#: Elements of a row that share a scale, the largest that divides a row; what none divides is kept in fp32.
BLOCKS = (256, 128, 64)


class Store(Protocol):
    """One state of one parameter, zero at first."""

    def read(self) -> Tensor:
        """As fp32; not to be written to."""

    def write(self, value: Tensor, finite: Tensor, seed: int, step: int) -> None:
        """fp32 `value`; where `finite` (0-d bool) is false no bit changes."""

    def tensors(self) -> dict[str, Tensor | Piece]:
        """Live tensors, or this rank's pieces of them, by suffix of the state's key."""


class Plain:
    """A tensor of the parameter's shape, fp32 or bf16."""

    def __init__(self, shard: Shard, key: str, dtype: torch.dtype) -> None:
        self.shard, self.name = shard, f"{shard.name}.{key}"
        self.tensor = torch.zeros_like(shard.local, dtype=dtype, requires_grad=False)

    def read(self) -> Tensor:
        return self.tensor.float()

    def write(self, value: Tensor, finite: Tensor, seed: int, step: int) -> None:
        value = torch.where(finite, value, self.read())
        place = {"offset": self.shard.offsets, "global_shape": self.shard.shape}
        round_to(self.tensor, value, seed=seed, step=step, name=self.name, **place)

    def tensors(self) -> dict[str, Tensor | Piece]:
        return {"": self.shard.piece(self.tensor)}


class EightBit:
    """A byte an element and an fp32 scale a block of a row: the dynamic map of Dettmers et al. 2021, arXiv
    2110.02861, by bitsandbytes, which finds the nearest value; the choice between both neighbours is ours.

    A row, along the last dimension, is never cut.
    """

    def __init__(self, shard: Shard, key: str, block: int, signed: bool) -> None:
        from bitsandbytes import functional

        self.shard, self.name, self.block = shard, f"{shard.name}.{key}", block
        self.functional = functional
        self.map = functional.create_dynamic_map(signed=signed).to(shard.local.device)
        *rows, length = shard.local.shape
        self.codes = torch.zeros(shard.local.shape, dtype=torch.uint8, device=shard.local.device)
        self.codes += int((self.map == 0).nonzero())
        self.scale = torch.zeros(*rows, length // block, device=shard.local.device)

    def read(self) -> Tensor:
        if self.codes.numel() == 0:
            return torch.zeros_like(self.codes, dtype=torch.float32)
        scale = self.scale.flatten()
        return self.functional.dequantize_blockwise(
            self.codes, absmax=scale, code=self.map, blocksize=self.block
        )

    def write(self, value: Tensor, finite: Tensor, seed: int, step: int) -> None:
        if value.numel() == 0:
            return
        value = value.contiguous()
        nearest, found = self.functional.quantize_blockwise(value, code=self.map, blocksize=self.block)
        scale = found.absmax.view(self.scale.shape)
        whole = (value.unflatten(-1, (-1, self.block)) / scale.unsqueeze(-1)).view(value.shape).nan_to_num()
        near = self.map[nearest.int()]
        other = (nearest.int() + torch.where(whole > near, 1, -1)).clamp(0, len(self.map) - 1)
        gap = self.map[other] - near
        share = torch.where(gap == 0, 0.0, (whole - near) / gap)
        draw = uniform(value, Noise(seed, step, self.name, self.shard.offsets, self.shard.shape))
        codes = torch.where(draw < share, other.to(torch.uint8), nearest)
        self.codes.copy_(torch.where(finite, codes, self.codes))
        self.scale.copy_(torch.where(finite, scale, self.scale))

    def tensors(self) -> dict[str, Tensor | Piece]:
        *rows, length = self.shard.shape
        shape = (*rows, length // self.block)
        offsets = (*self.shard.offsets[:-1], self.shard.offsets[-1] // self.block)
        whole = tuple(self.scale.shape) == shape
        return {
            "_codes": self.shard.piece(self.codes),
            "_scale": self.scale if whole else Piece(self.scale, shape, offsets),
        }


def eight_bit(shard: Shard, key: str, signed: bool) -> Store:
    """8 bit for matrices with rows of a multiple of 64 elements, fp32 for the rest: norms, biases."""
    blocks = [block for block in BLOCKS if len(shard.shape) > 1 and shard.shape[-1] % block == 0]
    return EightBit(shard, key, blocks[0], signed) if blocks else Plain(shard, key, torch.float32)
