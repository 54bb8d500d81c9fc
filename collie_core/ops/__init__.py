"""Fused operations, each with a plain reference, and the choice between their implementations."""

from __future__ import annotations

from collie_core.ops.attention import Scores
from collie_core.ops.cache import KVCache, LayerCache
from collie_core.ops.context import Context
from collie_core.ops.select import Ops, select_ops

__all__ = ["Context", "KVCache", "LayerCache", "Ops", "Scores", "select_ops"]
