"""docs/layouts.md and README's section on several processes: commands and snippets run as they stand."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml
from page_commands import blocks, run
from training_helpers import config, metrics

from collie_core.config.schema import CollieConfig
from collie_core.layouts.native import NativeLayoutPlugin
from collie_core.registry.options import validate_options

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "layouts.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTION = README.split("## More than one process")[1].split("\n## ")[0]


@pytest.fixture
def folder(tiny_llama: Path, data_file: Path, tmp_path: Path) -> Path:
    """A folder with the `train.yaml` that the pages speak of."""
    mapping = config(tiny_llama, data_file, Path("runs/demo"), train={"max_steps": 2}).to_mapping()
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(mapping))
    return tmp_path


def test_every_block_is_tested_here() -> None:
    assert len(blocks(PAGE, "bash")) == 3 and len(blocks(PAGE, "python")) == len(blocks(PAGE, "yaml")) == 1
    assert PAGE.count("```") == 2 * 5


@pytest.mark.parametrize("line", blocks(PAGE, "bash")[0].splitlines())
def test_the_sizes(line: str, folder: Path) -> None:
    run(line, folder)
    assert (folder / "runs/demo/model/config.json").is_file()


@pytest.mark.parametrize("text", [PAGE, SECTION], ids=["page", "readme"])
def test_the_explanation(text: str, folder: Path) -> None:
    [line] = [line for block in blocks(text, "bash") for line in block.splitlines() if "--explain" in line]
    said = run(line, folder).stdout
    assert "weights:" in said and "= 4" in said


def test_a_run_moves_to_another_layout(folder: Path) -> None:
    for line in blocks(PAGE, "bash")[2].splitlines():
        run(line, folder)
    assert [line["step"] for line in metrics(folder / "runs/moved")] == [1, 2, 3, 4]
    assert (folder / "exported/config.json").is_file()


def test_the_python_snippet(folder: Path) -> None:
    [code] = blocks(PAGE, "python")
    (folder / "script.py").write_text(code)
    assert run(f"{sys.executable} script.py", folder).stdout == "4 processes\n"


def test_the_yaml_shows_every_key_with_its_default() -> None:
    shown = yaml.safe_load(blocks(PAGE, "yaml")[0])["layout"]
    assert shown.pop("name") == CollieConfig(model={"path": "x"}).layout.name
    assert validate_options(NativeLayoutPlugin, shown) == NativeLayoutPlugin.Options()
    assert shown.keys() == NativeLayoutPlugin.Options.__dataclass_fields__.keys()


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
