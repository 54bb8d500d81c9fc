"""Versions of what a run depends on, for reports and records."""

from __future__ import annotations

import platform
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


def versions() -> dict[str, str]:
    """Of Python and of each library, or `not installed`."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
