"""Linears that multiply in float8: `plugins: [{name: float8}]`.  Importing this imports no torch."""

from __future__ import annotations

from collie_methods.float8.plugin import Float8Plugin

__all__ = ["Float8Plugin"]
