"""Write collie_core/known_plugins.json: every plugin of this project, for hints and lists.

Read from the `pyproject.toml` of each distribution and the first docstring line of each plugin class
(parsed, not imported), with the planned distributions of PLANNED.  Usage: python tools/known_plugins.py
"""

from __future__ import annotations

import ast
import json
import tomllib
from pathlib import Path

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
    ("model", "internlm", "collie-internlm", "InternLM"),
    ("model", "internlm2", "collie-internlm", "InternLM2"),
    ("model", "chatglm", "collie-chatglm", "ChatGLM and ChatGLM2"),
    ("model", "moss", "collie-moss", "MOSS"),
    ("model", "*", "collie-hf", "Any causal language model of transformers"),
    ("layout", "deepspeed", "collie-deepspeed", "DeepSpeed"),
    ("adapter", "lora", "collie-lora", "LoRA"),
    ("monitor", "system", "collie-system", "Network, disk and host memory"),
]


def known_plugins() -> list[dict[str, str | bool]]:
    """The entries of the file, in a stable order."""
    entries: list[dict[str, str | bool]] = []
    for project in sorted(ROOT.glob("collie_*/**/pyproject.toml")):
        data = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        for group, plugins in data.get("entry-points", {}).items():
            for name, value in plugins.items():
                entries.append(_entry(KINDS[group], name, data["name"], summary(value), True))
    present = {(entry["kind"], entry["name"]) for entry in entries}
    entries += [_entry(*planned, False) for planned in PLANNED if planned[:2] not in present]
    return sorted(entries, key=lambda entry: (str(entry["kind"]), str(entry["name"])))


def _entry(kind: str, name: str, distribution: str, text: str, released: bool) -> dict[str, str | bool]:
    return {"kind": kind, "name": name, "distribution": distribution, "summary": text, "released": released}


def summary(value: str) -> str:
    """The first docstring line of the class that `module:class` names, without its full stop."""
    module, _, name = value.partition(":")
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return (ast.get_docstring(node) or "").partition("\n")[0].removesuffix(".")
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            return summary(f"{node.module}:{name}")
    raise LookupError(f"{file}: no class {name}")


def text() -> str:
    """The file's contents."""
    return json.dumps(known_plugins(), indent=1) + "\n"


if __name__ == "__main__":
    OUTPUT.write_text(text(), encoding="utf-8")
    print(OUTPUT)
