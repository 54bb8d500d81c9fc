"""What a model plugin declares of its family, read from its source: nothing is imported.

A plugin class may state, as literals,

    supports = ("flash", "tp", "pp")
    checkpoints = ({"name": "openlm-research/open_llama_3b", "parameters": "3.4B", "licence": "..."}, ...)
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Declarations:
    """summary: the first line of the class's docstring.  checkpoints: mappings with `name`, and `parameters`
    and `licence` where they are stated.  supports: what the family can do, in words."""

    summary: str = ""
    checkpoints: tuple[Mapping[str, str], ...] = ()
    supports: tuple[str, ...] = ()


def declared(value: str, roots: Sequence[Path] | None = None) -> Declarations:
    """The declarations of the class that `module:class` names; empty ones where its source is not found.

    roots: folders in which the module is looked for, instead of Python's path.
    """
    module, _, name = value.partition(":")
    for file in _files(module, roots):
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError):
            continue
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                return _of_class(node)
            if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
                return declared(f"{node.module}:{name}", roots)
    return Declarations()


def _of_class(node: ast.ClassDef) -> Declarations:
    literals: dict[str, Any] = {}
    for statement in node.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        if isinstance(statement, ast.AnnAssign) and statement.value is not None:
            targets = [statement.target]
        for target in targets:
            if isinstance(target, ast.Name) and target.id in ("checkpoints", "supports"):
                try:
                    literals[target.id] = ast.literal_eval(statement.value)  # type: ignore[attr-defined]
                except ValueError:
                    continue
    summary = (ast.get_docstring(node) or "").partition("\n")[0].removesuffix(".")
    checkpoints = tuple(c for c in _listed(literals, "checkpoints") if isinstance(c, dict) and "name" in c)
    return Declarations(summary, checkpoints, tuple(map(str, _listed(literals, "supports"))))


def _listed(literals: Mapping[str, Any], name: str) -> list[Any]:
    found = literals.get(name)
    return list(found) if isinstance(found, list | tuple) else []


def _files(module: str, roots: Sequence[Path] | None) -> list[Path]:
    """Where the source of a module may be."""
    top, *rest = module.split(".")
    places = _top_level(top) if roots is None else [root / top for root in roots]
    found = [place.joinpath(*rest) for place in places]
    return [
        file
        for path in found
        for file in (path / "__init__.py", path.with_name(f"{path.name}.py"))
        if file.is_file()
    ]


def _top_level(name: str) -> list[Path]:
    """Folders (or the file, without its suffix) of a top-level package, which is not imported."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return []
    if spec is None:
        return []
    if spec.submodule_search_locations is not None:
        return [Path(place) for place in spec.submodule_search_locations]
    return [Path(spec.origin).with_suffix("")] if spec.origin and name not in sys.builtin_module_names else []
