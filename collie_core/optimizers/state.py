"""Optimizer states as flat names and tensors."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from collie_core.errors import CheckpointError, nearest


def load_state(own: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    """Copy `stored` into the live tensors `own`, in place.

    Raises CheckpointError, with nothing changed, where names or shapes differ.
    """
    problems = [f"{name}: is missing" for name in own if name not in stored]
    for name, tensor in stored.items():
        if name not in own:
            problems.append(f"{name}: belongs to no parameter that is trained{nearest(name, own)}")
        elif tensor.shape != own[name].shape:
            problems.append(f"{name}: has shape {list(tensor.shape)}, expected {list(own[name].shape)}")
    if problems:
        raise CheckpointError("the optimizer's state does not fit:\n  " + "\n  ".join(problems))
    for name, tensor in stored.items():
        own[name].copy_(tensor)
