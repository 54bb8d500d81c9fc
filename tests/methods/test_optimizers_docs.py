"""docs/optimizers.md: commands run, its table is the code's, and its sections are accepted."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from collie_core import CollieConfig
from collie_core.cli.methods import methods
from collie_core.registry import Registry
from collie_core.train.setup import checked_plugins

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "optimizers.md").read_text(encoding="utf-8")
BASH = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
YAML = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
ROWS = re.findall(r"^\| `(\w+)` \| ([0-9.e-]+) \| ([^|]*) \| [^|]* \| ([^|]*) \|", PAGE, re.MULTILINE)
OURS = {m.name: m for m in methods() if m.distribution == "collie-optimizers"}
ENGINE = {"in_backward", "clip_mode", "state_dtype"}


def test_every_block_is_tested_here() -> None:
    assert PAGE.count("```") == 2 * (len(BASH) + len(YAML)) and len(YAML) == 2


@pytest.mark.parametrize("line", BASH[0].splitlines())
def test_commands(line: str) -> None:
    command = [str(Path(sys.executable).parent / "collie"), *line.split()[1:]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "adamw" in done.stdout, done.stderr


@pytest.mark.parametrize("text", YAML)
def test_sections_are_accepted(text: str) -> None:
    assert not checked_plugins(CollieConfig(model={"path": "model"}, **yaml.safe_load(text)))[2]


def test_the_table_is_of_the_code() -> None:
    assert {row[0] for row in ROWS} == OURS.keys()
    for name, lr, states, options in ROWS:
        plugin: Any = Registry().load("optimizer", name).cls
        assert plugin.default_lr == float(lr)
        stated: dict[str, Any] = {}
        for key, value in re.findall(r"`(\w+): ([^`]+)`", options):
            stated[key] = yaml.safe_load(value)
        found = {k: v for k, v in dataclasses.asdict(plugin.Options()).items() if k not in ENGINE}
        assert {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()} == {
            k: float(v) if isinstance(v, str) else v for k, v in stated.items()
        }
        sizes = [f"{size:.3g}" for entry in OURS[name].states.values() for size in entry.values()]
        assert re.findall(r"[0-9.]+", states) == sizes


def test_which_take_the_engines_options() -> None:
    sentences = {"in_backward": r"^(.*?) take `in_backward", "state_dtype": r"^(.*?) take `state"}
    for option, words in sentences.items():
        [named] = re.findall(words, PAGE.replace("\n", " ").replace("``` ", "\n"), re.MULTILINE)
        takers = {m.name for m in methods() if option in m.supports and m.distribution != "collie-core"}
        assert takers <= set(re.findall(r"`(\w+)`", named))


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", PAGE):
        assert (DOCS / target).exists(), target
