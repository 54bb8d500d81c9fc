"""From a YAML file and `a.b=c` overrides to a checked CollieConfig."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from collie_core.config.document import Document, parse_value, read
from collie_core.config.problems import ConfigProblems
from collie_core.config.schema import CollieConfig
from collie_core.errors import ConfigError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> CollieConfig:
    """Read, override and validate.  Raises ConfigError with file, line, key path and the nearest key."""
    document = read(Path(path))
    if document.data is None:
        document.data = {}
    if not isinstance(document.data, dict):
        raise ConfigError(
            f"{path}: expected a mapping of keys such as `model:`, got {type(document.data).__name__}"
        )
    for override in overrides:
        apply_override(document, override)
    if not all(isinstance(key, str) for key in document.data):
        bad = next(key for key in document.data if not isinstance(key, str))
        raise ConfigError(f"{document.source}: a key must be a word, got {bad!r}")
    document.data.setdefault("output_dir", f"runs/{Path(path).stem}")
    try:
        config = CollieConfig(**document.data)
    except ConfigProblems as found:
        raise ConfigProblems(found.problems, document.locate) from None
    config._document = document
    return config


def apply_override(document: Document, override: str) -> None:
    """Set one key of the document's data from `key.path=value`; a list item is its index."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"override {override!r}: expected key.path=value, such as train.epochs=2")
    target: Any = document.data
    for position, part in enumerate(parts[:-1]):
        target = _step(target, part, override)
        if isinstance(target, str):  # `optimizer: lomo` stands for `{name: lomo}`
            target = {"name": target}
            _assign(document.data, parts[: position + 1], target, override)
    _put(target, parts[-1], parse_value(text, override), override)
    document.overridden(tuple(int(part) if part.isdigit() else part for part in parts), override)


def _step(target: Any, part: str, override: str) -> Any:
    if isinstance(target, list):
        return target[_index(target, part, override)]
    if not isinstance(target, dict):
        raise ConfigError(
            f"override {override!r}: there is nothing below {part!r}'s parent, which is {target!r}"
        )
    if target.get(part) is None:
        target[part] = {}
    return target[part]


def _assign(data: Any, parts: list[str], value: Any, override: str) -> None:
    for part in parts[:-1]:
        data = _step(data, part, override)
    _put(data, parts[-1], value, override)


def _put(target: Any, part: str, value: Any, override: str) -> None:
    if isinstance(target, list):
        target[_index(target, part, override)] = value
    elif isinstance(target, dict):
        target[part] = value
    else:
        raise ConfigError(f"override {override!r}: {part!r} stands below {target!r}, which is no mapping")


def _index(target: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(target):
        raise ConfigError(
            f"override {override!r}: expected an index from 0 to {len(target) - 1}, got {part!r}"
        )
    return int(part)
