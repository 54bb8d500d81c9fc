"""Optimizer states as flat names and tensors."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from collie_core.errors import CheckpointError, nearest
from collie_core.shard import Piece


def load_state(own: Mapping[str, Tensor | Piece], stored: Mapping[str, Tensor]) -> None:
    """Copy `stored`, this rank's parts, into the live tensors and pieces `own`, in place.

    Raises CheckpointError, with nothing changed, where names or shapes differ.
    """
    live = {name: value.local if isinstance(value, Piece) else value for name, value in own.items()}
    problems = [f"{name}: is missing" for name in live if name not in stored]
    for name, tensor in stored.items():
        if name not in live:
            problems.append(f"{name}: belongs to no parameter that is trained{nearest(name, live)}")
        elif tensor.shape != live[name].shape:
            problems.append(f"{name}: has shape {list(tensor.shape)}, expected {list(live[name].shape)}")
    if problems:
        raise CheckpointError("the optimizer's state does not fit:\n  " + "\n  ".join(problems))
    for name, tensor in stored.items():
        live[name].copy_(tensor)
