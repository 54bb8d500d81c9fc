"""LOMO and AdaLomo: each parameter is updated while the gradients are computed, and its gradient freed.

The optimizers `lomo` and `adalomo` of a config; `Lomo` and `AdaLomo` for a plain PyTorch loop.
Importing this imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from collie_methods.lomo.plugin import AdaLomoPlugin, LomoPlugin

if TYPE_CHECKING:
    from collie_methods.lomo.standalone import AdaLomo, Lomo

__all__ = ["AdaLomo", "AdaLomoPlugin", "Lomo", "LomoPlugin"]


def __getattr__(name: str) -> Any:
    if name not in ("AdaLomo", "Lomo"):
        raise AttributeError(f"module 'collie_methods.lomo' has no attribute {name!r}")
    from collie_methods.lomo import standalone

    return getattr(standalone, name)
