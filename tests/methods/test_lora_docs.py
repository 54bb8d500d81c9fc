"""docs/lora.md: commands and snippets run as they stand, and the tables are the code's."""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
from contextlib import chdir
from pathlib import Path

import pytest
import yaml
from page_commands import blocks, fill, run

from collie_core import CollieConfig
from collie_core.cli.main import main
from collie_core.registry.options import validate_options
from collie_core.train.setup import check_run
from collie_methods.lora import LoraPlugin, PrefixTuningPlugin, PromptTuningPlugin, PTuningPlugin

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "lora.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tiny_llama: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the page speaks of, and its run."""
    path = tmp_path_factory.mktemp("lora_page")
    fill(path, tiny_llama, data)
    (path / "lora.yaml").write_text(blocks(PAGE, "yaml")[0])
    for line in blocks(PAGE, "bash")[0].splitlines():
        name, *arguments = shlex.split(line)
        with chdir(path):
            assert name == "collie" and main(arguments) == 0, line
    return path


def test_the_commands(folder: Path) -> None:
    assert (folder / "runs/lora/model/adapter_config.json").is_file()
    assert (folder / "merged/config.json").is_file() and (folder / "merged/tokenizer.json").is_file()


@pytest.mark.parametrize("number", [0, 1])
def test_the_python_snippets(number: int, folder: Path) -> None:
    (folder / f"script{number}.py").write_text(blocks(PAGE, "python")[number])
    run(f"{sys.executable} script{number}.py", folder)
    if number == 0:
        assert (folder / "copy/adapter_config.json").is_file() and (folder / "plain/config.json").is_file()


def test_several_adapters_are_accepted() -> None:
    sections = yaml.safe_load(blocks(PAGE, "yaml")[1])
    check_run(CollieConfig(model={"path": "x"}, data={"train": "x"}, **sections))
    assert len(blocks(PAGE, "yaml")) == len(blocks(PAGE, "python")) == 2 and len(blocks(PAGE, "bash")) == 1


def test_the_options_of_lora_and_their_defaults() -> None:
    section = PAGE.split("## LoRA\n")[1].split("\n## ")[0]
    shown = dict(re.findall(r"^\| `(\w+)` \| `?([^|`]+)`? \|", section, re.MULTILINE))
    defaults = dataclasses.asdict(validate_options(LoraPlugin, {}))
    assert shown == {key: _said(value) for key, value in defaults.items()}


def test_the_options_of_virtual_tokens() -> None:
    section = PAGE.split("## Prompt tuning")[1].split("\n## ")[0]
    for plugin, name in (
        (PromptTuningPlugin, "prompt_tuning"),
        (PTuningPlugin, "p_tuning"),
        (PrefixTuningPlugin, "prefix_tuning"),
    ):
        [row] = [line for line in section.splitlines() if line.startswith(f"| `{name}`")]
        for field in dataclasses.fields(plugin.Options):
            assert f"`{field.name}`" in row or f"`{field.name}`" in section.rpartition("|\n")[2]


def _said(value: object) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def test_the_rates_are_the_codes() -> None:
    factors = [p.default_lr_factor for p in (PromptTuningPlugin, PTuningPlugin, PrefixTuningPlugin)]
    assert "are {:.0f}, {:.0f} and {:.0f} times".format(*factors) in PAGE
    assert LoraPlugin.default_lr_factor == 10.0 and "ten times the optimizer's own" in PAGE


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert target.startswith("https://") or (ROOT / "docs" / target).exists(), target
