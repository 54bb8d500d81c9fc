"""docs/plugins.md tells what is so."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from collie_core import hookspecs
from collie_core.registry import Registry, RunPlugins

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "plugins.md").read_text()


def snippets(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT, re.DOTALL)


def test_the_tables_are_fresh() -> None:
    code = "import hook_tables; print(hook_tables.text(), end='')"
    fresh = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT / "tools"
    ).stdout
    assert fresh == DOCUMENT, "run `make docs`"
    for name in vars(hookspecs):
        assert not name.startswith("collie_") or f"`{name}(" in DOCUMENT


def test_the_strangers_project_is_the_examples() -> None:
    (shown,) = snippets("toml")
    assert tomllib.loads(shown) == tomllib.loads((ROOT / "examples/third_party/pyproject.toml").read_text())


def test_the_class_works_as_shown(install: Callable[..., str]) -> None:
    source = snippets("python")[0].replace("class Warn:", "class Plugin:")
    install(source, kind="plugin", name="warn")
    plugins = RunPlugins(Registry())
    plugins.add("plugin", "warn", {"limit": 5})

    class Run:
        reason = ""

        def stop(self, reason: str) -> None:
            self.reason = reason

    run: Any = Run()
    plugins.broadcast("collie_step_end", run=run, step=1, metrics={"loss": 4.0})
    assert run.reason == ""
    plugins.broadcast("collie_step_end", run=run, step=2, metrics={"loss": 6.0})
    assert run.reason == "loss 6.0 in step 2"
