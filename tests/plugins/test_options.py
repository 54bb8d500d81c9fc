"""A config section becomes the plugin's `Options`, by strict rules, with every mistake told at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from collie_core.config.problems import ConfigProblems
from collie_core.registry import Registry, options_of, options_schema, validate_options


@dataclass(frozen=True)
class Warmup:
    steps: int = 0


class Plugin:
    @dataclass(frozen=True)
    class Options:
        eps: Annotated[float, Field(gt=0)] = 1e-8
        betas: tuple[float, float] = (0.9, 0.99)
        mode: Literal["auto", "keep", "two_pass"] = "auto"
        folder: Path | None = None
        fused: bool = False
        count: int = 1
        warmup: Warmup = field(default_factory=Warmup)


class Plain:
    pass


def problems(options: dict[str, Any]) -> dict[tuple[str | int, ...], str]:
    with pytest.raises(ConfigProblems) as caught:
        validate_options(Plugin, options)
    return dict(caught.value.problems)


def test_plain_values_become_the_declared_types() -> None:
    options = validate_options(
        Plugin, {"eps": 1, "betas": [0.5, 1], "folder": "a/b", "warmup": {"steps": 3}, "mode": "keep"}
    )
    assert options == Plugin.Options(
        eps=1.0, betas=(0.5, 1.0), folder=Path("a/b"), warmup=Warmup(3), mode="keep"
    )
    assert isinstance(options.eps, float) and type(options) is Plugin.Options
    assert validate_options(Plugin, {"betas": (0.1, 0.2), "folder": Path("c")}).folder == Path("c")
    assert validate_options(Plugin, {}) == Plugin.Options()


@pytest.mark.parametrize(
    ("options", "path", "expected"),
    [
        ({"eps": "1"}, ("eps",), "expected a number > 0, got '1'"),
        ({"eps": 0}, ("eps",), "expected a number > 0, got 0"),
        ({"count": True}, ("count",), "expected a whole number, got True"),
        ({"count": 2.0}, ("count",), "expected a whole number, got 2.0"),
        ({"fused": 1}, ("fused",), "expected true or false, got 1"),
        ({"mode": "kep"}, ("mode",), "expected auto or keep or two_pass, got 'kep', did you mean 'keep'?"),
        ({"betas": [0.1, "x"]}, ("betas", 1), "got 'x'"),
        ({"ep": 1.0}, ("ep",), "unknown key, did you mean 'eps'?"),
        ({"warmup": {"step": 1}}, ("warmup", "step"), "unknown key, did you mean 'steps'?"),
        ({"folder": object()}, ("folder",), "expected a plain value"),
    ],
)
def test_wrong_values_are_refused(
    options: dict[str, Any], path: tuple[str | int, ...], expected: str
) -> None:
    assert expected in problems(options)[path]


def test_all_mistakes_are_told_at_once() -> None:
    assert set(problems({"eps": -1, "cuont": 1, "fused": "yes"})) == {("eps",), ("cuont",), ("fused",)}


def test_a_plugin_without_options_takes_none() -> None:
    assert options_of(Plain) is None and validate_options(Plain, {}) is None
    with pytest.raises(ConfigProblems, match="size: unknown key: the plugin has no options"):
        validate_options(Plain, {"size": 1})
    assert options_schema(Plain)["properties"] == {}


def test_keys_of_the_core_are_told_beside_the_options() -> None:
    with pytest.raises(ConfigProblems, match=r"lrr: unknown key, did you mean 'lr'\? \(known: .*eps.* lr, "):
        validate_options(Plugin, {"lrr": 1}, ["lr"])
    with pytest.raises(ConfigProblems, match="lrr: unknown key, did you mean 'lr'.: the plugin"):
        validate_options(Plain, {"lrr": 1}, ["lr"])


def test_the_schema_refuses_unknown_keys_and_knows_the_limits() -> None:
    schema = options_schema(Plugin)
    assert set(schema["properties"]) == {"eps", "betas", "mode", "folder", "fused", "count", "warmup"}
    assert schema["additionalProperties"] is False and schema["properties"]["eps"]["exclusiveMinimum"] == 0
    assert schema["$defs"]["Warmup"]["additionalProperties"] is False
    assert "__pydantic_config__" not in vars(Plugin.Options)  # a stranger's class stays as it is


def test_an_instance_is_made_from_a_section(install: Callable[..., str]) -> None:
    install(
        "from dataclasses import dataclass\n"
        "from collie_core.hookspecs import hookimpl\n"
        "class Plugin:\n"
        "    collie_api = 1\n"
        "    @dataclass(frozen=True)\n"
        "    class Options:\n"
        "        every: int\n"
        "    def __init__(self, options): self.options = options\n"
        "    @hookimpl\n"
        "    def collie_monitor(self, run): return self\n"
    )
    registry = Registry()
    assert registry.instantiate("monitor", {"name": "acme", "every": 3}).options.every == 3
    with pytest.raises(ConfigProblems, match="monitors.0.every: is required"):
        registry.instantiate("monitor", {"name": "acme"}, ("monitors", 0))
