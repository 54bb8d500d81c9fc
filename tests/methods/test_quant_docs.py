"""docs/quantisation.md: its commands run as they stand, and its tables are the code's."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from page_commands import blocks, fill, run

from collie_core.registry.options import validate_options
from collie_methods.quant import Nf4Plugin

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "quantisation.md").read_text(encoding="utf-8")


def test_the_commands(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    fill(tmp_path, tiny_llama, data)
    [config], [commands] = blocks(PAGE, "yaml"), blocks(PAGE, "bash")
    (tmp_path / "qlora.yaml").write_text(config)
    for line in commands.splitlines():
        run(line, tmp_path)
    assert (tmp_path / "runs/qlora/model/collie_base.json").is_file()
    assert (tmp_path / "merged/model.safetensors").is_file()


def test_the_options_and_their_defaults() -> None:
    shown = dict(re.findall(r"^\| `(\w+)` \| ([^|`]+) \| n", PAGE, re.MULTILINE))
    defaults = dataclasses.asdict(validate_options(Nf4Plugin, {}))
    assert shown == {key: str(value) for key, value in defaults.items()}


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert target.startswith("https://") or (ROOT / "docs" / target).exists(), target
