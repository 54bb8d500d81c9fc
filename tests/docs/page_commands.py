"""What tests of a documentation page share: its code blocks, the folder it speaks of, and its commands."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def fill(folder: Path, model: Path, data: Path) -> None:
    """The model `open_llama_3b`, data/train.jsonl and data/eval.jsonl."""
    shutil.copytree(model, folder / "open_llama_3b")
    (folder / "data").mkdir()
    for name in ("train", "eval"):
        shutil.copy(data, folder / "data" / f"{name}.jsonl")


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a line as a shell in the environment of these tests would; it must end well."""
    done = subprocess.run(
        shlex.split(command),
        cwd=folder,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done
