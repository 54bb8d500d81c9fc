"""Adan, Lion, Muon, SophiaG, and AdamW with 8-bit states.  Importing this imports no torch."""

from collie_methods.optimizers.muon_plugin import MuonPlugin
from collie_methods.optimizers.plugin import AdamW8bitPlugin, AdanPlugin, LionPlugin, SophiaGPlugin

__all__ = ["AdamW8bitPlugin", "AdanPlugin", "LionPlugin", "MuonPlugin", "SophiaGPlugin"]
