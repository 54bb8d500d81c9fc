"""What is wrong with a config, in the user's words: where, the value, what was expected, the nearest name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from collie_core.errors import ConfigError, nearest

if TYPE_CHECKING:
    from pydantic import ValidationError

Key = tuple[str | int, ...]


class ConfigProblems(ConfigError):
    """Every problem found in a config, each with its key path."""

    def __init__(
        self, problems: Iterable[tuple[Key, str]], locate: Callable[[Key], str] | None = None
    ) -> None:
        self.problems, self._locate = list(problems), locate
        lines = []
        for path, message in self.problems:
            where = f"{locate(path)}: " if locate else ""
            name = f"{dotted(path)}: " if path else ""
            lines.append(f"{where}{name}{message}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[Any, ...]:
        """For another process: the same text, with the places as they were found here."""
        places = {path: self._locate(path) for path, _ in self.problems} if self._locate else None
        return type(self), (self.problems, places.get if places else None)

    def below(self, prefix: Key) -> ConfigProblems:
        """The same problems for a section that stands at `prefix`."""
        return ConfigProblems([((*prefix, *path), message) for path, message in self.problems])


def dotted(path: Key) -> str:
    """`monitors.1.project` for a key path."""
    return ".".join(map(str, path))


def from_pydantic(error: ValidationError, schema: Mapping[str, Any], data: Any) -> ConfigProblems:
    """The problems in a pydantic error, told through the JSON `schema` of what was validated.

    The branches of a union are told once, as what the key may be.
    """
    found: dict[Key, str] = {}
    for item in error.errors():
        path = _existing(
            item["loc"], data, item["type"] in ("missing", "extra_forbidden", "unexpected_keyword_argument")
        )
        if path in found:
            continue
        if item["type"] in ("extra_forbidden", "no_such_attribute", "unexpected_keyword_argument"):
            known = _properties(schema_at(schema, path[:-1], schema), schema)
            found[path] = f"unknown key{nearest(str(path[-1]), known)}" + (
                f" (known: {', '.join(known)})" if known else ""
            )
        elif item["type"] == "missing":
            found[path] = "is required"
        elif item["type"] in ("value_error", "assertion_error"):
            found[path] = str(item["ctx"]["error"]) if "ctx" in item else item["msg"]
        else:
            expected = describe(schema_at(schema, path, schema), schema) or item["msg"]
            value = _value(data, path)
            choices = [c for c in _choices(schema_at(schema, path, schema), schema) if isinstance(c, str)]
            hint = nearest(value, choices) if isinstance(value, str) else ""
            found[path] = f"expected {expected}, got {value!r}{hint}"
    return ConfigProblems(found.items())


def _existing(loc: tuple[int | str, ...], data: Any, allow_last: bool) -> Key:
    """`loc` without the names that pydantic adds for the branches of a union."""
    path: list[int | str] = []
    for position, part in enumerate(loc):
        inside = (isinstance(data, Mapping) and part in data) or (
            isinstance(data, list | tuple) and isinstance(part, int) and part < len(data)
        )
        if inside:
            path.append(part)
            data = data[part]
        elif (isinstance(data, str) and part == "name") or (allow_last and position == len(loc) - 1):
            path.append(part)  # `schedule: cosine` stands for `{name: cosine}`
    return tuple(path)


def _value(data: Any, path: Key) -> Any:
    for part in path:
        data = data if isinstance(data, str) and part == "name" else data[part]
    return data


def schema_at(schema: Mapping[str, Any], path: Key, root: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a JSON schema for a key path, or {}."""
    options = [_resolve(option, root) for option in _branches(schema, root)]
    if not path:
        return schema
    for option in options:
        part = path[0]
        if isinstance(part, int) and part < len(option.get("prefixItems", [])):
            return schema_at(option["prefixItems"][part], path[1:], root)
        if isinstance(part, int) and "items" in option:
            return schema_at(option["items"], path[1:], root)
        if isinstance(part, str) and part in option.get("properties", {}):
            return schema_at(option["properties"][part], path[1:], root)
    return {}


def _resolve(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    if "$ref" in schema:
        return _resolve(root["$defs"][schema["$ref"].rsplit("/", 1)[1]], root)
    return schema


def _branches(schema: Mapping[str, Any], root: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    schema = _resolve(schema, root)
    branches = schema.get("anyOf") or schema.get("allOf") or [schema]
    return [_resolve(branch, root) for branch in branches]


def _properties(schema: Mapping[str, Any], root: Mapping[str, Any]) -> list[str]:
    return sorted(name for branch in _branches(schema, root) for name in branch.get("properties", {}))


def _choices(schema: Mapping[str, Any], root: Mapping[str, Any]) -> list[Any]:
    found: list[Any] = []
    for branch in _branches(schema, root):
        found += branch.get("enum", [branch["const"]] if "const" in branch else [])
    return found


_TYPES = {"boolean": "true or false", "string": "text", "object": "a mapping", "null": "null"}


def describe(schema: Mapping[str, Any], root: Mapping[str, Any]) -> str:
    """In words, what a JSON schema admits, such as `a whole number >= 1 or null`."""
    words: list[str] = []
    for branch in _branches(schema, root):
        kind = branch.get("type")
        if "enum" in branch or "const" in branch:
            words.append(" or ".join(str(choice) for choice in branch.get("enum", [branch.get("const")])))
        elif kind in ("integer", "number"):
            limits = [
                f"{sign} {branch[key] if isinstance(branch[key], int) else format(branch[key], 'g')}"
                for key, sign in (
                    ("minimum", ">="),
                    ("exclusiveMinimum", ">"),
                    ("maximum", "<="),
                    ("exclusiveMaximum", "<"),
                )
                if key in branch
            ]
            words.append(
                " ".join(
                    ["a whole number" if kind == "integer" else "a number", " and ".join(limits)]
                ).strip()
            )
        elif kind == "array":
            inner = describe(branch["items"], root) if "items" in branch else ""
            each = ", ".join(describe(item, root) for item in branch.get("prefixItems", []))
            words.append(f"a list of {inner}" if inner else f"[{each}]" if each else "a list")
        elif kind in _TYPES:
            words.append(_TYPES[kind] + (f" that matches {branch['pattern']}" if "pattern" in branch else ""))
    return " or ".join(dict.fromkeys(words))
