"""Write collie_core/known_plugins.json: every plugin of this project, for hints and lists.

Read from the `pyproject.toml` of each distribution and the docstring and declarations of each plugin class
(parsed, not imported), with the planned distributions of PLANNED.  Usage: python tools/known_plugins.py
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from collie_core.registry.declarations import declared

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "collie_core" / "known_plugins.json"
KINDS = {
    "collie.models": "model",
    "collie.layouts": "layout",
    "collie.optimizers": "optimizer",
    "collie.adapters": "adapter",
    "collie.monitors": "monitor",
    "collie.plugins": "plugin",
}
#: (kind, name, distribution, summary) of what the design names and no folder holds yet
PLANNED = [
    ("monitor", "system", "collie-system", "Network, disk and host memory"),
]


def known_plugins() -> list[dict[str, Any]]:
    """The entries of the file, in a stable order."""
    entries: list[dict[str, Any]] = []
    for project in sorted(ROOT.glob("collie_*/**/pyproject.toml")):
        data = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        for group, plugins in data.get("entry-points", {}).items():
            for name, value in plugins.items():
                found = declared(value, [ROOT])
                if not found.summary:
                    raise LookupError(f"{project}: {name} = {value}: no class with a docstring")
                entry = _entry(KINDS[group], name, data["name"], found.summary, True)
                if found.supports:
                    entry["supports"] = found.supports
                if found.checkpoints:
                    entry["checkpoints"] = found.checkpoints
                if found.in_backward:
                    entry["in_backward"] = True
                if found.state_bytes:
                    entry["state_bytes"] = found.state_bytes
                if found.weight_bytes:
                    entry["weight_bytes"] = found.weight_bytes
                entries.append(entry)
    present = {(entry["kind"], entry["name"]) for entry in entries}
    entries += [_entry(*planned, False) for planned in PLANNED if planned[:2] not in present]
    return sorted(entries, key=lambda entry: (entry["kind"], entry["name"]))


def _entry(kind: str, name: str, distribution: str, text: str, released: bool) -> dict[str, Any]:
    return {"kind": kind, "name": name, "distribution": distribution, "summary": text, "released": released}


def text() -> str:
    """The file's contents."""
    return json.dumps(known_plugins(), indent=1) + "\n"


if __name__ == "__main__":
    OUTPUT.write_text(text(), encoding="utf-8")
    print(OUTPUT)
