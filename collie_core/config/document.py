"""A YAML document as plain data, with the line of every key: YAML 1.2 scalars, duplicate keys refused."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from collie_core.errors import ConfigError

Key = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2: `3e-4` is a number, `yes` and `1:30` are text."""


def _int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node).lower()
    return int(text, 8) if text.startswith("0o") else int(text, 16) if text.startswith("0x") else int(text)


_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}
_Loader.yaml_implicit_resolvers = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}
for _name, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _int)


@dataclass
class Document:
    """Parsed YAML: `data`, the line (from 1) of every key path, and the overrides given beside it."""

    source: str
    data: Any
    lines: dict[Key, int] = field(default_factory=dict)
    overrides: dict[Key, str] = field(default_factory=dict)

    def locate(self, path: Key) -> str:
        """`file:line` of `path`, or of the nearest key above it; the override where one set it."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.overrides:
                return f"override {self.overrides[path[:length]]!r}"
            if path[:length] in self.lines:
                return f"{self.source}:{self.lines[path[:length]]}"
        return self.source

    def overridden(self, path: Key, override: str) -> None:
        """Note that `override` set `path`: what stood below it has no place any more."""
        for places in (self.lines, self.overrides):
            for below in [key for key in places if len(key) > len(path) and key[: len(path)] == path]:
                del places[below]
        self.overrides[path] = override


def parse(text: str, source: str) -> Document:
    """Parse YAML text.  Raises ConfigError with file and line for bad syntax and keys given twice."""
    loader = _Loader(text)
    loader.name = source
    try:
        node = loader.get_single_node()
        document = Document(source, None)
        if node is not None:
            _walk(node, (), document)
            document.data = loader.construct_document(node)
        return document
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{source}{line}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{source}: nested too deeply") from None
    finally:
        loader.dispose()


def read(path: Path) -> Document:
    """Parse a YAML file.  Raises ConfigError where it cannot be read."""
    try:
        return parse(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        from collie_core.errors import nearest

        folder = path.parent
        known = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        raise ConfigError(f"{path}: no such config file{nearest(path.name, known)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None


def parse_value(text: str, override: str) -> Any:
    """The value of an override such as `3e-4`, `[a, b]` or `{name: lora}`.  Raises ConfigError naming it."""
    return parse(text, f"override {override!r}").data


def _walk(node: yaml.Node, path: Key, document: Document, above: tuple[yaml.Node, ...] = ()) -> None:
    """Record the line of every key below `node`; refuse duplicates, and aliases of what is `above` them."""
    if any(node is one for one in above):
        raise ConfigError(
            f"{document.source}:{node.start_mark.line + 1}: {'.'.join(map(str, path))}: an alias of what it "
            "stands in"
        )
    above = (*above, node)
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            document.lines[(*path, index)] = item.start_mark.line + 1
            _walk(item, (*path, index), document, above)
    elif isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{document.source}:{line}: a key must be a plain word")
            key = (*path, key_node.value)
            if key in document.lines and key_node.value != "<<":
                name = ".".join(map(str, key))
                raise ConfigError(
                    f"{document.source}:{line}: {name}: given twice, first on line {document.lines[key]}"
                )
            document.lines[key] = line
            _walk(value_node, key, document, above)
