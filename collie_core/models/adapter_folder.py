"""Folders of adapters: which plugin reads one, and which model it is for.

A folder is one of an adapter where it holds `adapter_config.json` (the layout of peft), whose `peft_type`,
in lower case, is the adapter plugin's name, as `model_type` is the model plugin's in a `config.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collie_core.errors import CheckpointError
from collie_core.files import read_json_object

ADAPTER_FILE = "adapter_config.json"
#: beside it, where the model that the adapter is for was packed: the sections of the config that say how
BASE_FILE = "collie_base.json"


@dataclass(frozen=True)
class AdapterSpec:
    """An adapter plugin by name, and its options: `path` where a folder says the rest, and `adapter_name`
    where there are several."""

    name: str
    options: Mapping[str, Any]

    @classmethod
    def of_section(cls, section: Mapping[str, Any]) -> AdapterSpec:
        """That of an entry of a config's `adapters`."""
        return cls(section["name"], {key: value for key, value in section.items() if key != "name"})


def adapter_folders(folder: Path) -> list[Path]:
    """`folder`, where it is an adapter's, else those in it that are."""
    if (folder / ADAPTER_FILE).is_file():
        return [folder]
    return sorted(file.parent for file in folder.glob(f"*/{ADAPTER_FILE}"))


def read_adapters(folders: list[Path]) -> tuple[str, tuple[AdapterSpec, ...]]:
    """(path or hub id of the model that they are for, the adapters).

    Raises CheckpointError for an unreadable config, or adapters of different models.
    """
    specs: list[AdapterSpec] = []
    packing: dict[str, AdapterSpec] = {}
    bases: dict[str, Path] = {}
    for folder in folders:
        content = read_json_object(folder / ADAPTER_FILE)
        values = [content.get(key) for key in ("peft_type", "base_model_name_or_path")]
        for key, value in zip(("peft_type", "base_model_name_or_path"), values, strict=True):
            if not isinstance(value, str) or not value:
                raise CheckpointError(f"{folder / ADAPTER_FILE}: {key}: expected a name, got {value!r}")
        kind, base = map(str, values)
        bases[base] = folder
        named = {"adapter_name": folder.name} if len(folders) > 1 else {}
        packing |= {repr(spec): spec for spec in _packing(folder / BASE_FILE)}
        specs.append(AdapterSpec(kind.lower(), {"path": str(folder), **named}))
    if len(bases) > 1:
        told = ", ".join(f"{folder} is for {base}" for base, folder in bases.items())
        raise CheckpointError(f"these adapters do not belong together: {told}")
    return next(iter(bases)), (*packing.values(), *specs)


def _packing(path: Path) -> list[AdapterSpec]:
    """What packs the model that an adapter is for; nothing without the file.  Raises CheckpointError."""
    sections = read_json_object(path).get("adapters") if path.is_file() else []
    if not isinstance(sections, list) or not all(
        isinstance(section, dict) and isinstance(section.get("name"), str) for section in sections
    ):
        raise CheckpointError(f"{path}: adapters: expected a list of mappings with a name, got {sections!r}")
    return [AdapterSpec.of_section(section) for section in sections]
