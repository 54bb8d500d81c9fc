"""What a run does with its plugins: wrapped factories, isolated events, checks, provenance."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import pytest

from collie_core.errors import PluginError
from collie_core.hookspecs import hookimpl
from collie_core.registry import Registry, RunPlugins

RUN: Any = None  # hooks below do not look at it
SOURCE = """
from dataclasses import dataclass, field
from collie_core.hookspecs import hookimpl
LOG = []

@dataclass(frozen=True)
class Options:
    tag: str = "x"
    mood: str = "well"

@dataclass
class Plugin:  # instances with equal options are equal, and none can be hashed
    options: Options
    collie_api = 1
    Options = Options

    @property
    def fragile(self):
        raise RuntimeError("a property that must not run")

    @hookimpl
    def {required}(self, run):
        if self.options.mood == "empty":
            return None
        if self.options.mood == "import":
            import not_there_at_all
        if self.options.mood == "raise":
            raise ValueError("of its own")
        return self.options.tag

    @hookimpl
    def collie_check(self, run):
        problems = {{"refuse": ["cannot do a", "cannot do b"], "text": "cannot", "wrong": 3}}
        return problems.get(self.options.mood)

    @hookimpl
    def collie_step_end(self, step):
        if self.options.mood == "fail":
            raise ValueError("broken pipe")
        if self.options.mood == "exit":
            raise SystemExit(3)
        LOG.append((self.options.tag, step))
"""
WRAPPER = """
from collie_core.hookspecs import hookimpl
class Plugin:
    collie_api = 1
    @hookimpl(wrapper=True)
    def collie_monitor(self):
        return "wrapped " + (yield)
    @hookimpl(wrapper=True)
    def collie_check(self):
        found = yield
        return [["softened " + text for text in texts] for texts in found]
"""


@pytest.fixture
def acme(install: Callable[..., str]) -> str:
    return install(SOURCE.format(required="collie_monitor"))


class Recorder:
    """A user's callback."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    @hookimpl
    def collie_step_end(self, step: int) -> None:
        self.log.append(f"{self.name} {step}")


def log_of(plugins: RunPlugins) -> list[tuple[str, int]]:
    import sys

    found: list[tuple[str, int]] = sys.modules[type(plugins.of_kind("monitor")[0].instance).__module__].LOG
    return found


def test_the_same_plugin_may_appear_twice_even_with_equal_options(acme: str) -> None:
    plugins = RunPlugins(Registry())
    first, second = plugins.add("monitor", "acme"), plugins.add("monitor", "acme")
    assert (first.key, second.key) == (
        "monitor:0:acme",
        "monitor:1:acme",
    ) and first.instance == second.instance
    third = plugins.add("monitor", f"{acme}:acme", {"tag": "y"})
    assert [plugins.call_one(plugin, "collie_monitor", run=RUN) for plugin in (first, second, third)] == [
        "x",
        "x",
        "y",
    ]
    plugins.broadcast("collie_step_end", run=RUN, step=4, metrics={})
    assert log_of(plugins) == [("x", 4), ("x", 4), ("y", 4)]


def test_runs_share_nothing(acme: str) -> None:
    one, other = RunPlugins(Registry()), RunPlugins(Registry())
    one.add("monitor", "acme")
    assert other.of_kind("monitor") == [] and other.provenance() == []


def test_a_factory_is_wrapped_by_plugins_of_kind_plugin(acme: str, install: Callable[..., str]) -> None:
    install(WRAPPER, kind="plugin", name="wrapper")
    plugins = RunPlugins(Registry())
    first, second = (
        plugins.add("monitor", "acme", {"tag": "a", "mood": "refuse"}),
        plugins.add("monitor", "acme"),
    )
    plugins.add("plugin", "wrapper")
    assert plugins.call_one(first, "collie_monitor", run=RUN) == "wrapped a"
    assert plugins.call_one(second, "collie_monitor", run=RUN) == "wrapped x"
    assert [text.rpartition(": ")[2] for text in plugins.check(RUN)] == [
        "softened cannot do a",
        "softened cannot do b",
    ]


def test_a_factory_that_fails_is_told_with_its_origin(acme: str) -> None:
    plugins = RunPlugins(Registry())
    with pytest.raises(
        PluginError, match=f"monitor 'acme' \\({acme} 2.5\\): its collie_monitor returned nothing"
    ):
        plugins.call_one(plugins.add("monitor", "acme", {"mood": "empty"}), "collie_monitor", run=RUN)
    with pytest.raises(PluginError, match=f"{acme} 2.5\\) cannot be used: ModuleNotFoundError"):
        plugins.call_one(plugins.add("monitor", "acme", {"mood": "import"}), "collie_monitor", run=RUN)
    with pytest.raises(ValueError, match="of its own") as caught:
        plugins.call_one(plugins.add("monitor", "acme", {"mood": "raise"}), "collie_monitor", run=RUN)
    assert caught.value.__notes__ == [f"raised by monitor 'acme' ({acme} 2.5)"]


def test_checks_of_all_plugins_are_collected(acme: str) -> None:
    plugins = RunPlugins(Registry())
    plugins.add("monitor", "acme")
    plugins.add("monitor", "acme", {"mood": "refuse"})
    plugins.add("monitor", "acme", {"mood": "text"})
    label = f"monitor 'acme' ({acme} 2.5)"
    assert plugins.check(RUN) == [f"{label}: cannot do a", f"{label}: cannot do b", f"{label}: cannot"]
    plugins.add("monitor", "acme", {"mood": "wrong"})
    with pytest.raises(PluginError, match="collie_check returned 3, no list of texts"):
        plugins.check(RUN)


@pytest.mark.parametrize(("mood", "cause"), [("fail", "ValueError: broken pipe"), ("exit", "SystemExit: 3")])
def test_a_failing_monitor_is_reported_once_and_dropped(
    acme: str, mood: str, cause: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plugins = RunPlugins(Registry())
    plugins.add("monitor", "acme", {"tag": "before"})
    plugins.add("monitor", "acme", {"mood": mood})
    plugins.add("monitor", "acme", {"tag": "after"})
    for step in (1, 2):
        plugins.broadcast("collie_step_end", run=RUN, step=step, metrics={})
    assert log_of(plugins) == [("before", 1), ("after", 1), ("before", 2), ("after", 2)]
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1
    assert f"monitor 'acme' ({acme} 2.5) failed in collie_step_end" in warnings[0] and cause in warnings[0]


def test_a_failing_part_of_the_computation_ends_the_run(install: Callable[..., str]) -> None:
    distribution = install(SOURCE.format(required="collie_optimizer"), kind="optimizer")
    plugins = RunPlugins(Registry())
    plugins.add("optimizer", "acme", {"mood": "fail"})
    with pytest.raises(ValueError, match="broken pipe") as caught:
        plugins.broadcast("collie_step_end", run=RUN, step=1, metrics={})
    assert caught.value.__notes__ == [f"raised by optimizer 'acme' ({distribution} 2.5)"]


def test_callbacks_are_called_in_order_and_isolated(capsys: pytest.CaptureFixture[str]) -> None:
    log: list[str] = []

    class Failing:
        @hookimpl
        def collie_step_end(self) -> None:
            raise KeyError("gone")

    class First:
        @hookimpl(tryfirst=True)
        def collie_step_end(self) -> None:
            log.append("first")

    class Around:
        @hookimpl(wrapper=True)
        def collie_step_end(self) -> Generator[None, Any, Any]:
            log.append("in")
            yield
            log.append("out")

    plugins = RunPlugins(Registry())
    for index, callback in enumerate([Recorder(log, "a"), Failing(), Recorder(log, "b"), First(), Around()]):
        plugins.register_object(callback, f"callback:{index}")
    for step in (1, 2):
        plugins.broadcast("collie_step_end", run=RUN, step=step, metrics={})
    assert log == ["in", "first", "a 1", "b 1", "out", "in", "first", "a 2", "b 2", "out"]
    assert capsys.readouterr().err.count("Failing failed in collie_step_end") == 1


def test_a_callback_must_keep_the_contract() -> None:
    @dataclass
    class Misspelt:
        @hookimpl
        def collie_step_ended(self) -> None: ...

    plugins = RunPlugins(Registry())
    with pytest.raises(
        PluginError, match="callback .*Misspelt cannot be used: .*did you mean 'collie_step_end'"
    ):
        plugins.register_object(Misspelt(), "callback:0")
    with pytest.raises(PluginError, match="none of its methods is marked with @hookimpl"):
        plugins.register_object(object(), "callback:0")


def test_provenance_lists_every_plugin_with_version_and_file(acme: str) -> None:
    plugins = RunPlugins(Registry())
    plugins.add("monitor", "acme")
    plugins.register_object(Recorder([], "a"), "callback:0")
    monitor, callback = plugins.provenance()
    assert (monitor["kind"], monitor["name"], monitor["distribution"], monitor["version"]) == (
        "monitor",
        "acme",
        acme,
        "2.5",
    )
    assert monitor["file"].endswith(".py") and (callback["kind"], callback["name"]) == (
        "callback",
        "Recorder",
    )
    assert callback["file"] == __file__
