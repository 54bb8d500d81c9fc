"""A plugin's `Options`: a plain frozen dataclass, made from a config section by strict rules.

No value is turned into another type: `"1"` is no number, `1` no bool and `2.0` no int; an int serves as a
float, a list as a tuple, a text as a Path.  Limits come from `Annotated[float, pydantic.Field(gt=0)]`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collie_core.config.problems import ConfigProblems, from_pydantic
from collie_core.errors import nearest

if TYPE_CHECKING:
    from pydantic import BaseModel


def options_of(cls: type) -> type | None:
    """The plugin's `Options`, or None where it has no options."""
    return getattr(cls, "Options", None)


def validate_options(cls: type, options: Mapping[str, Any], core_keys: Sequence[str] = ()) -> Any:
    """The plugin's `Options` from a config section without its `name`; None where it has none.

    core_keys: keys of the section that the core reads itself, told where another is unknown.
    Raises ConfigProblems with the key path and message of everything that is wrong.
    """
    section = options_of(cls)
    if section is None:
        if options:
            raise ConfigProblems(
                ((key,), f"unknown key{nearest(key, core_keys)}: the plugin has no options")
                for key in options
            )
        return None
    from pydantic import ValidationError

    model, plain = _section_model(section), {"options": _plain(options, ())}
    try:
        # JSON, because strict validation of Python values refuses dicts for dataclasses and lists for tuples
        return getattr(model.model_validate_json(json.dumps(plain)), "options")  # noqa: B009 (a made model)
    except ValidationError as error:
        schema = model.model_json_schema()
        own = schema["$defs"][schema["properties"]["options"]["$ref"].rsplit("/", 1)[1]]
        own["properties"] = {**own.get("properties", {}), **{key: {} for key in core_keys}}
        found = from_pydantic(error, schema, plain)
        raise ConfigProblems([(path[1:], message) for path, message in found.problems]) from None


def options_schema(cls: type) -> dict[str, Any]:
    """JSON schema of the plugin's options, with `$defs` for nested types; unknown keys are refused."""
    section = options_of(cls)
    if section is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    schema = _section_model(section).model_json_schema()
    definitions = schema["$defs"]
    own: dict[str, Any] = definitions.pop(schema["properties"]["options"]["$ref"].rsplit("/", 1)[1])
    return {**own, "$defs": definitions} if definitions else own


@lru_cache(maxsize=256)
def _section_model(options: Any) -> type[BaseModel]:
    """A model with the options as its one field: its settings hold for the dataclass and all below it."""
    from pydantic import ConfigDict, create_model

    settings = ConfigDict(extra="forbid", strict=True, protected_namespaces=())
    return create_model("Section", __config__=settings, options=(options, ...))


def _plain(value: Any, path: tuple[str | int, ...]) -> Any:
    """The value as JSON can say it; options given in Python may hold tuples and paths."""
    if isinstance(value, Mapping):
        return {key: _plain(item, (*path, key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, (*path, index)) for index, item in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise ConfigProblems([(path, f"expected a plain value, got {value!r} of type {type(value).__name__}")])
