"""Plugins: found by installed metadata, loaded when a run names them, asked through hooks.

`discovery` reads metadata, `registry` picks and imports, `contract` checks a class against the hook
specifications, `options` validates a config section, `run_plugins` holds what one run selected.
"""

from __future__ import annotations

from collie_core.registry.discovery import PluginInfo, namespace_blockers
from collie_core.registry.options import options_of, options_schema, validate_options
from collie_core.registry.registry import LoadedPlugin, Registry
from collie_core.registry.run_plugins import RunPlugins, SelectedPlugin

__all__ = [
    "LoadedPlugin",
    "PluginInfo",
    "Registry",
    "RunPlugins",
    "SelectedPlugin",
    "namespace_blockers",
    "options_of",
    "options_schema",
    "validate_options",
]
