"""docs/float8.md: its commands run as they stand, but emulated, and its table is the code's."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from page_commands import blocks, fill, run

from collie_core.registry.options import validate_options
from collie_methods.float8 import Float8Plugin

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "float8.md").read_text(encoding="utf-8")


def test_the_commands(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    fill(tmp_path, tiny_llama, data)
    [config], [commands] = blocks(PAGE, "yaml"), blocks(PAGE, "bash")
    emulated = config.replace("recipe: tensorwise", "recipe: tensorwise, emulate: true")
    assert emulated != config
    (tmp_path / "float8.yaml").write_text(emulated)
    done = [run(line, tmp_path) for line in commands.splitlines()]
    assert "float8 products while training, a scale for each tensor" in done[0].stdout + done[0].stderr
    assert (tmp_path / "runs/float8/model/model.safetensors").is_file()


def test_the_options_and_their_defaults() -> None:
    shown = dict(re.findall(r"^\| `(\w+)` \| ([^|`]+) \| ", PAGE, re.MULTILINE))
    defaults = dataclasses.asdict(validate_options(Float8Plugin, {}))
    assert shown == {key: str(value) for key, value in defaults.items()}


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert target.startswith("https://") or (ROOT / "docs" / target).exists(), target
