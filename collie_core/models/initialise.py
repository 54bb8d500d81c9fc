"""Random initial weights: each a function of the seed and its name, whatever the layout."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from collie_core.models.buffers import reset_buffers
from collie_core.models.loading import Slots


def initial_value(name: str, shape: torch.Size, seed: int, std: float) -> Tensor:
    """fp32 on the CPU: matrices normal with deviation `std`, vectors 1 (norms), those named bias 0."""
    if name.rpartition(".")[2] == "bias":
        return torch.zeros(shape)
    if len(shape) < 2:
        return torch.ones(shape)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator) * std


def initialise(
    model: nn.Module,
    seed: int,
    std: float,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> None:
    """Allocate a meta module and fill every parameter with its `initial_value`, one at a time."""
    slots = Slots(model)
    for name, tensor in list(slots.tensors.items()):
        if name not in slots.copies:
            slots.allocate(name, device, dtype).copy_(initial_value(name, tensor.shape, seed, std))
    reset_buffers(model, torch.device(device))
