"""The Python of docs/checkpoints.md runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch

from collie_core.checkpoint.manager import CheckpointManager
from collie_core.checkpoint.store import save_tensors

DOCS = Path(__file__).parents[2] / "docs" / "checkpoints.md"


def test_the_snippet_prints_what_a_checkpoint_holds(tmp_path: Path) -> None:
    tensors = {"embed.weight": torch.ones(7, 2), "embed.weight.momentum": torch.ones(7, 2).bfloat16()}
    manager = CheckpointManager(tmp_path / "runs" / "demo")
    path = manager.save(500, lambda folder: save_tensors(tensors, folder), {"epoch": 1})
    listed = re.findall(r"^ {8}(\w+\.\w+)", DOCS.read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(entry.name for entry in path.iterdir())
    [snippet] = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "runs/demo/checkpoints/step_000500 500 ['epoch']",
        "embed.weight (7, 2) torch.float32",
        "embed.weight.momentum (7, 2) torch.bfloat16",
    ]
