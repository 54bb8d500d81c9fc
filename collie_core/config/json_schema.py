"""The JSON schema of the whole config, with the options of every installed plugin."""

from __future__ import annotations

import copy
from typing import Any

from collie_core.config.schema import CollieConfig
from collie_core.errors import PluginError
from collie_core.registry import Registry, options_schema

#: config key -> plugin kind, and whether the key holds a list of sections
_KEYS = {
    "layout": ("layout", False),
    "optimizer": ("optimizer", False),
    "adapters": ("adapter", True),
    "monitors": ("monitor", True),
    "plugins": ("plugin", True),
}


def full_schema() -> dict[str, Any]:
    """JSON schema for editors: a section admits exactly the options of the plugin that it names."""
    schema = CollieConfig.model_json_schema()
    registry = Registry()
    for key, (kind, many) in _KEYS.items():
        node = schema["properties"][key]
        target = node["items"] if many else node
        core = schema["$defs"][target.pop("$ref").rsplit("/", 1)[1]]
        choices = [
            _section(core, name, options, schema) for name, options in _installed(registry, kind).items()
        ]
        target["anyOf"] = [
            {"type": "string", "enum": [c["properties"]["name"]["const"] for c in choices]},
            *choices,
        ]
    return schema


def _installed(registry: Registry, kind: str) -> dict[str, dict[str, Any]]:
    found = {}
    for info in registry.plugins():
        if info.kind == kind:
            try:
                found[info.name] = options_schema(registry.load(kind, f"{info.distribution}:{info.name}").cls)
            except PluginError:  # a broken plugin is not offered; `collie plugins --check` says why
                continue
    return found


def _section(
    core: dict[str, Any], name: str, options: dict[str, Any], root: dict[str, Any]
) -> dict[str, Any]:
    """A section of one plugin: the core's keys and its own, and no others."""
    section = copy.deepcopy(core)
    section["title"] = name
    section["properties"] = {**section["properties"], **options.get("properties", {})}
    section["properties"]["name"] = {"const": name, "type": "string"}
    section["required"] = ["name", *options.get("required", [])]
    section["additionalProperties"] = False
    root["$defs"].update(options.get("$defs", {}))
    return section
