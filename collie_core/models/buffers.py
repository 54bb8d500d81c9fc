"""Buffers of a module: those that a checkpoint holds, and those that the module makes itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from collie_core.errors import PluginError, listed


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that a checkpoint holds, by name."""
    kept = module.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in kept}


def made_buffers(module: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """(module, name in it, buffer) of those that no checkpoint holds."""
    return [
        (owner, leaf, buffer)
        for owner in module.modules()
        for leaf, buffer in owner.named_buffers(recurse=False)
        if leaf in owner._non_persistent_buffers_set
    ]


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Give what a checkpoint holds another dtype; the other buffers keep theirs, as rotary tables must."""
    made = made_buffers(model)
    model.to(dtype)
    for owner, leaf, buffer in made:
        setattr(owner, leaf, buffer)


def reset_buffers(model: nn.Module, device: torch.device) -> None:
    """Make the buffers that no checkpoint holds, by the module's own `reset_buffers(device)`.

    Raises PluginError where one stays on meta.
    """
    reset = getattr(model, "reset_buffers", None)
    if any(buffer.is_meta for buffer in model.buffers()) and callable(reset):
        reset(device)
    left = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if left:
        raise PluginError(
            f"{type(model).__name__}: no value for the buffers {listed(left)}, which no checkpoint holds; "
            "its model plugin must make them in reset_buffers(device)"
        )
