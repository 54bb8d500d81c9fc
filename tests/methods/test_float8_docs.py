"""docs/float8.md: its commands run as they stand, but emulated, and its table is the code's."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from collie_core.registry.options import validate_options
from collie_methods.float8 import Float8Plugin

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "float8.md").read_text(encoding="utf-8")


def test_the_commands(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "open_llama_3b")
    (tmp_path / "data").mkdir()
    for name in ("train", "eval"):
        shutil.copy(data, tmp_path / "data" / f"{name}.jsonl")
    [config] = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    [commands] = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    emulated = config.replace("recipe: tensorwise", "recipe: tensorwise, emulate: true")
    assert emulated != config
    (tmp_path / "float8.yaml").write_text(emulated)
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    said = []
    for line in commands.splitlines():
        done = subprocess.run(
            shlex.split(line), cwd=tmp_path, env=env, capture_output=True, text=True, timeout=180
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        said.append(done.stdout + done.stderr)
    assert "float8 products while training, a scale for each tensor" in said[0]
    assert (tmp_path / "runs/float8/model/model.safetensors").is_file()


def test_the_options_and_their_defaults() -> None:
    shown = dict(re.findall(r"^\| `(\w+)` \| ([^|`]+) \| ", PAGE, re.MULTILINE))
    defaults = dataclasses.asdict(validate_options(Float8Plugin, {}))
    assert shown == {key: str(value) for key, value in defaults.items()}


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert target.startswith("https://") or (ROOT / "docs" / target).exists(), target
