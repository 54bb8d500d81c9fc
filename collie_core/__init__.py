"""CoLLiE's core.  Importing it imports nothing heavy; the names below load on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collie_core.config.schema import CollieConfig
    from collie_core.models.auto import AutoModelForCausalLM, AutoTokenizer
    from collie_core.train.trainer import Trainer

__version__ = "0.1.0"
__all__ = ["AutoModelForCausalLM", "AutoTokenizer", "CollieConfig", "Trainer", "__version__"]

_HOMES = {
    "AutoModelForCausalLM": "collie_core.models.auto",
    "AutoTokenizer": "collie_core.models.auto",
    "CollieConfig": "collie_core.config.schema",
    "Trainer": "collie_core.train.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'collie_core' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
