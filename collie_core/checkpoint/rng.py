"""The state of every random generator of the process, as JSON values."""

from __future__ import annotations

import base64
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy
import torch

from collie_core.errors import CheckpointError

if TYPE_CHECKING:
    from collie_core.config.schema import CollieConfig


def rng_state() -> dict[str, Any]:
    """State of Python's, numpy's global and torch's generators (CPU, this process's CUDA device), as JSON
    values."""
    numpy_state = numpy.random.get_state(legacy=False)
    words = {"key": numpy_state["state"]["key"].tolist(), "pos": numpy_state["state"]["pos"]}
    return {
        "python": random.getstate(),
        "numpy": numpy_state | {"state": words},
        "torch": _encode(torch.get_rng_state()),
        "cuda": _encode(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
    }


def restore_rng(state: Mapping[str, Any]) -> None:
    """Inverse of rng_state; where either side had no CUDA device, a generator of one is left as it is.

    Raises CheckpointError for a state that rng_state did not make.
    """
    try:
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss))
        numpy.random.set_state(state["numpy"])
        torch.set_rng_state(_decode(state["torch"]))
        if torch.cuda.is_available() and state["cuda"] is not None:
            torch.cuda.set_rng_state(_decode(state["cuda"]))
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"state of the random generators is malformed: {error}") from error


def restore_rng_of_rank(state: Mapping[str, Any], config: CollieConfig, rank: int) -> bool:
    """Restore what a checkpoint's `state.json` has of this rank, if every rank is what it was: only then do
    they draw as they would have gone on to.  Returns whether they do.

    Raises CheckpointError as restore_rng does.
    """
    sizes = ("dp_size", "tp_size", "pp_size")
    if any(state["config"].get(key) != getattr(config, key) for key in sizes):
        return False
    try:
        own = state["rng"][rank]
    except (LookupError, TypeError) as error:
        raise CheckpointError(f"state of the random generators is malformed: {error!r}") from error
    restore_rng(own)
    return True


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.uint8)
