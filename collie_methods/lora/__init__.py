"""Adapters in the layout of peft: `adapters: [{name: lora, r: 8}]`.  Importing this imports no torch."""

from __future__ import annotations

from collie_methods.lora.plugin import LoraPlugin
from collie_methods.lora.prompt_plugins import PrefixTuningPlugin, PromptTuningPlugin, PTuningPlugin

__all__ = ["LoraPlugin", "PTuningPlugin", "PrefixTuningPlugin", "PromptTuningPlugin"]
