"""The state of every random generator of the process, as JSON values."""

from __future__ import annotations

import base64
import random
from collections.abc import Mapping
from typing import Any

import numpy
import torch

from collie_core.errors import CheckpointError


def rng_state() -> dict[str, Any]:
    """State of Python's, numpy's global and torch's generators (CPU, each CUDA device), as JSON values."""
    numpy_state = numpy.random.get_state(legacy=False)
    words = {"key": numpy_state["state"]["key"].tolist(), "pos": numpy_state["state"]["pos"]}
    return {
        "python": random.getstate(),
        "numpy": numpy_state | {"state": words},
        "torch": _encode(torch.get_rng_state()),
        "cuda": [_encode(state) for state in torch.cuda.get_rng_state_all()]
        if torch.cuda.is_available()
        else [],
    }


def restore_rng(state: Mapping[str, Any]) -> None:
    """Inverse of rng_state; CUDA devices that either side lacks are left as they are.

    Raises CheckpointError for a state that rng_state did not make.
    """
    try:
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss))
        numpy.random.set_state(state["numpy"])
        torch.set_rng_state(_decode(state["torch"]))
        if torch.cuda.is_available():
            for device, encoded in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
                torch.cuda.set_rng_state(_decode(encoded), device)
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"state of the random generators is malformed: {error}") from error


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.uint8)
