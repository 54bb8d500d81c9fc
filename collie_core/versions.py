"""Versions of what a run depends on, for reports and records."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib import metadata

LIBRARIES = (
    "collie-core",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "pluggy",
    "pydantic",
    "huggingface-hub",
    "numpy",
)
#: Used where they are found, and not missed where they are not.
OPTIONAL = ("triton", "flash-attn", "flash-attn-3", "flash-attn-4", "liger-kernel")


@cache
def versions() -> Mapping[str, str]:
    """Of Python and of each library, or `not installed`; of optional ones where they are installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    for name in OPTIONAL:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
