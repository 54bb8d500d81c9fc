"""Quantised bases for adapters: `adapters: [nf4, {name: lora, r: 8}]`.  Importing this imports no torch."""

from __future__ import annotations

from collie_methods.quant.plugin import Int8Plugin, Nf4Plugin

__all__ = ["Int8Plugin", "Nf4Plugin"]
