"""A plugin that breaks the contract stops only the commands that select it, and is told in full."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from collie_core.cli.main import main
from collie_core.errors import PluginError
from collie_core.registry import Registry, RunPlugins

HEAD = "from dataclasses import dataclass\nfrom collie_core.hookspecs import hookimpl\n"
CLASS = f"{HEAD}class Plugin:\n    collie_api = 1\n"
SOUND = """
    @hookimpl
    def collie_monitor(self, run):
        return "a monitor"
"""

BROKEN = {
    "missing library": ("import not_there_at_all", "No module named 'not_there_at_all'"),
    "exit at import": ("raise SystemExit('no GPU')", "SystemExit: no GPU"),
    "syntax error": ("def", "SyntaxError"),
    "no such class": ("class Other: pass", "has no attribute 'Plugin'"),
    "no class": ("Plugin = 'a text'", "'a text', which is no class"),
    "no API": (f"{HEAD}class Plugin:{SOUND}", "states no plugin API; write `collie_api = 1`"),
    "newer API": (
        f"{HEAD}class Plugin:\n    collie_api = 2\n{SOUND}",
        "plugin API 2, but this core speaks 1; upgrade collie-core",
    ),
    "older API": (
        f"{HEAD}class Plugin:\n    collie_api = (0,)\n{SOUND}",
        "plugin API 0, but this core speaks 1; upgrade it",
    ),
    "unknown hook": (
        f"{CLASS}{SOUND}    @hookimpl\n    def collie_step_edn(self, run): pass",
        "unknown hook 'collie_step_edn', did you mean 'collie_step_end'?",
    ),
    "unknown argument": (
        f"{CLASS}{SOUND}    @hookimpl\n    def collie_step_end(self, metric): pass",
        "collie_step_end takes an unknown argument 'metric', did you mean 'metrics'? (known: run, step, ",
    ),
    "unmarked hook": (
        "class Plugin:\n    collie_api = 1\n    def collie_monitor(self, run): pass",
        "not marked with @hookimpl",
    ),
    "no required hook": (
        CLASS,
        "does not implement collie_monitor, which every monitor must",
    ),
    "only a wrapper": (
        f"{CLASS}    @hookimpl(wrapper=True)\n    def collie_monitor(self): return (yield)",
        "does not implement collie_monitor",
    ),
    "old wrapper": (
        f"{CLASS}{SOUND}    @hookimpl(hookwrapper=True)\n    def collie_step_end(self): yield",
        "write wrapper=True",
    ),
    "options of another type": (
        f"{CLASS}    class Options: pass\n{SOUND}",
        "Options is no dataclass",
    ),
    "an option called name": (
        f"{CLASS}    @dataclass\n    class Options:\n        name: str = ''\n{SOUND}",
        "Options has a field `name`",
    ),
    "failing constructor": (
        f"{CLASS}    def __init__(self): raise OSError('no licence file')\n{SOUND}",
        "making it failed: OSError: no licence file",
    ),
    "wrapper without yield": (
        f"{CLASS}{SOUND}    @hookimpl(wrapper=True)\n    def collie_step_end(self): return 1",
        "generator function",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_plugin_is_told_with_origin_and_cause(fault: str, install: Callable[..., str]) -> None:
    source, expected = BROKEN[fault]
    distribution = install(source, name="broken")
    plugins = RunPlugins(Registry())
    plugins.add("monitor", "console")  # a run that does not select it is not disturbed
    with pytest.raises(PluginError) as caught:
        plugins.add("monitor", "broken")
    message = str(caught.value)
    assert expected in message and f"{distribution} 2.5" in message and "monitor 'broken'" in message


def test_the_place_of_a_failing_import_and_the_cure_are_told(install: Callable[..., str], site: Path) -> None:
    distribution = install("x = 1\n\nimport not_there_at_all\n", name="broken")
    with pytest.raises(PluginError) as caught:
        Registry().load("monitor", "broken")
    (file,) = site.glob("*.py")
    message = str(caught.value)
    assert (
        f"({file}:3)" in message
        and f"(entry point broken = {file.stem}:Plugin of collie.monitors)" in message
    )
    assert f"pip uninstall {distribution}" in message


def test_check_imports_each_by_itself(
    install: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    install(BROKEN["exit at import"][0], name="broken")
    install(f"{HEAD}class Plugin:\n    collie_api = (1, 2)\n{SOUND}", name="sound")
    assert main(["plugins", "--check", "--json"]) == 1
    listed = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert listed["broken"]["status"] == "broken" and "SystemExit: no GPU" in listed["broken"]["problem"]
    assert listed["sound"]["status"] == "ok"
    ours = {entry["status"] for entry in listed.values() if entry["distribution"].startswith("collie-")}
    assert ours == {"ok"}, listed


def test_a_slow_import_is_remarked(install: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    distribution = install(
        f"import time; time.sleep(2.1)\n{HEAD}class Plugin:\n    collie_api = 1\n{SOUND}", name="slow"
    )
    main(["plugins", "--check"])
    captured = capsys.readouterr()
    assert f"importing monitor 'slow' of {distribution} took 2." in captured.err
    assert "slow" in captured.out


def test_an_optional_hook_of_a_newer_core_is_admitted(install: Callable[..., str]) -> None:
    hook = "    @hookimpl(optionalhook=True)\n    def collie_not_yet(self, anything): pass\n"
    install(f"{CLASS}{SOUND}{hook}")
    RunPlugins(Registry()).add("monitor", "acme")
