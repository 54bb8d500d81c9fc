"""The commands of docs/launch.md, and of README's lines about several processes, run as they stand."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest
import yaml
from page_commands import blocks, run
from training_helpers import config

from collie_core.cli import slurm

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "launch.md").read_text()
README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in blocks(PAGE, "bash") for line in block.splitlines() if line]
INLINE = re.findall(r"`(collie (?:train|slurm) train\.yaml [^`]*(?:_size|nodes)[^`]*)`", README)


def test_there_are_commands() -> None:
    assert len(COMMANDS) == 3 and len(INLINE) == 2


@pytest.mark.parametrize("command", dict.fromkeys([*COMMANDS, *INLINE]))
def test_the_commands_run(command: str, tiny_llama: Path, data_file: Path, tmp_path: Path) -> None:
    mapping = config(tiny_llama, data_file, Path("runs/demo"), train={"max_steps": 2}).to_mapping()
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(mapping))
    words = shlex.split(command)
    if words[:2] == ["collie", "slurm"] and "--dry-run" not in words:
        words.append("--dry-run")  # a slurm to submit to is there in tests/slurm
    done = run(shlex.join(words), tmp_path)
    if "slurm" in words:
        assert done.stdout.startswith("#!/bin/bash")
    else:
        assert (tmp_path / "runs/demo/model/config.json").is_file()


def test_the_table_names_the_options() -> None:
    parser = argparse.ArgumentParser()
    slurm.add_arguments(parser)
    known = {name for action in parser._actions for name in action.option_strings}
    rows = [line for line in PAGE.splitlines() if line.startswith("| `--")]
    named = {name for row in rows for name in re.findall(r"--[a-z-]+", row.split("|")[1])}
    assert named == known - {"-h", "--help", "--dry-run"}
