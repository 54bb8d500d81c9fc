"""What a plugin declares of itself, read from its source: nothing is imported.

A plugin class may state, as literals,

    supports = ("flash", "tp", "pp")
    checkpoints = ({"name": "openlm-research/open_llama_3b", "parameters": "3.4B", "licence": "..."}, ...)
    in_backward = True
    state_bytes = {"": {"element": 8}, "state_dtype: bfloat16": {"element": 4}}
    weight_bytes = {"": 0.5625, "block_size: 32": 0.625}

(`collie_core.hookspecs` says which kind states what), or have them from a base class in the same file.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STATED = ("checkpoints", "supports", "in_backward", "state_bytes", "weight_bytes")


@dataclass(frozen=True)
class Declarations:
    """summary: the first line of the class's docstring.  checkpoints: mappings with `name`, and `parameters`
    and `licence` where they are stated.  supports: what it can do, or be combined with, in words.
    in_backward: gradients are used and freed one by one.  state_bytes: by options, what has how many.
    weight_bytes: by options, how many a parameter of the model has that is packed."""

    summary: str = ""
    checkpoints: tuple[Mapping[str, str], ...] = ()
    supports: tuple[str, ...] = ()
    in_backward: bool = False
    state_bytes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    weight_bytes: Mapping[str, float] = field(default_factory=dict)


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
        classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
        if name in classes:
            return _of_class(classes[name], classes)
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
                return declared(f"{node.module}:{name}", roots)
    return Declarations()


def _of_class(node: ast.ClassDef, classes: Mapping[str, ast.ClassDef]) -> Declarations:
    literals = _literals(node, classes)
    summary = (ast.get_docstring(node) or "").partition("\n")[0].removesuffix(".")
    checkpoints = tuple(c for c in _listed(literals, "checkpoints") if isinstance(c, dict) and "name" in c)
    stated = literals.get("state_bytes")
    state_bytes = {
        str(options): _sizes(sizes)
        for options, sizes in (stated.items() if isinstance(stated, dict) else ())
        if isinstance(sizes, dict)
    }
    return Declarations(
        summary,
        checkpoints,
        tuple(map(str, _listed(literals, "supports"))),
        literals.get("in_backward") is True,
        state_bytes,
        _sizes(literals.get("weight_bytes")),
    )


def _literals(node: ast.ClassDef, classes: Mapping[str, ast.ClassDef]) -> dict[str, Any]:
    """Those of the class, over those of its base classes in the same file."""
    literals: dict[str, Any] = {}
    for base in reversed(node.bases):
        if isinstance(base, ast.Name) and base.id in classes and base.id != node.name:
            literals |= _literals(classes[base.id], classes)
    for statement in node.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        if isinstance(statement, ast.AnnAssign) and statement.value is not None:
            targets = [statement.target]
        for target in targets:
            if isinstance(target, ast.Name) and target.id in STATED:
                try:
                    literals[target.id] = ast.literal_eval(statement.value)  # type: ignore[attr-defined]
                except ValueError:
                    continue
    return literals


def _listed(literals: Mapping[str, Any], name: str) -> list[Any]:
    found = literals.get(name)
    return list(found) if isinstance(found, list | tuple) else []


def _sizes(stated: object) -> dict[str, float]:
    """The numbers of a mapping."""
    found = stated if isinstance(stated, dict) else {}
    return {str(what): size for what, size in found.items() if isinstance(size, int | float)}


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
