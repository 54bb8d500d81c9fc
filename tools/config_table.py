"""Write docs/config.md: every key of the configuration, from the models that validate it.

Usage: python tools/config_table.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from collie_core.config.problems import describe
from collie_core.config.schema import CollieConfig

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "config.md"
INTRODUCTION = """# Configuration

One set of names: the keys of the YAML file, the overrides of the command line (`train.epochs=2`), and the
attributes of `CollieConfig` in Python. Unknown keys and wrong values are refused with file, line and the
nearest known key; so is assignment in Python. Numbers follow YAML 1.2 (`3e-4` is one). `name` and
`{name: name}` mean the same. Relative paths count from the working directory.

A section that names a plugin also takes that plugin's own options: `collie config schema` prints them all, as
JSON schema, and `collie config show CONFIG` a config with every default filled in.

This page is generated from the models that validate the config.
"""


def page() -> str:
    """The whole page, as Markdown."""
    schema = CollieConfig.model_json_schema()
    lines = [INTRODUCTION, "| key | may be | default | |", "|---|---|---|---|"]
    cells = ([cell.replace("|", "\\|") for cell in row] for row in rows(schema, "", schema))
    lines += [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join(lines) + "\n"


def rows(schema: dict[str, Any], prefix: str, root: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """(key, kind, default, description) of every key below a section."""
    for name, field in schema["properties"].items():
        section = _section(field, root)
        key = f"{prefix}{name}"
        if section is None:
            if name in schema.get("required", []):
                default = "required"
            else:  # the schema does not know what a factory makes, which is an empty list
                default = f"`{json.dumps(field.get('default', []))}`"
            yield f"`{key}`", describe(field, root), default, field.get("description", "")
            continue
        many = "items" in field
        summary = (section.get("description") or "").split("\n\n")[0].replace("\n", " ")
        yield (
            f"**`{key}`**",
            "a list of sections" if many else "a section",
            "",
            field.get("description", summary),
        )
        yield from rows(section, f"{key}[]." if many else f"{key}.", root)


def _section(field: dict[str, Any], root: dict[str, Any]) -> dict[str, Any] | None:
    """The schema of the section that a key holds (of each item of a list), or None for a plain value."""
    for option in (field, field.get("items", {}), *field.get("anyOf", [])):
        reference = option.get("$ref") or option.get("items", {}).get("$ref")
        if reference:
            found: dict[str, Any] = root["$defs"][reference.rsplit("/", 1)[1]]
            return found
    return None


if __name__ == "__main__":
    DOCUMENT.write_text(page(), encoding="utf-8")
