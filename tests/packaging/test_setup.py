"""`make setup` keeps a torch that it finds, and does what changed files ask for, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging_environments import ROOT, link_libraries, names_of_ours


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository without what set-up or runs have made."""
    folder = tmp_path_factory.mktemp("checkout") / "collie"
    made = shutil.ignore_patterns(
        ".git", ".venv*", "__pycache__", ".*_cache", "dist", "runs", "work", "wandb"
    )
    shutil.copytree(ROOT, folder, symlinks=True, ignore=made)
    return folder


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str | None], Path]:
    """`stand_in("2.99.0")`: an interpreter with every library of this one and a torch of that version."""
    hidden = {name.replace("-", "_") for name in names_of_ours()} | {"torch", "functorch", "torchgen"}

    def make(torch: str | None) -> Path:
        folder = tmp_path_factory.mktemp("interpreter") / "venv"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        (site,) = folder.glob("lib/python*/site-packages")
        link_libraries(site, lambda entry: entry.split("-")[0] not in hidden)
        if torch is not None:
            (site / "torch").mkdir()
            (site / "torch" / "__init__.py").write_text(f"__version__ = '{torch}'\n")
            (site / f"torch-{torch}.dist-info").mkdir()
            metadata = f"Metadata-Version: 2.1\nName: torch\nVersion: {torch}\n"
            (site / f"torch-{torch}.dist-info" / "METADATA").write_text(metadata)
        return folder / "bin" / "python"

    return make


def make(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`make setup`, with pip kept off every index and every setting of this machine."""
    off_line = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    inherited = {
        k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "MAKE", "PYTHON", "VIRTUAL"))
    }
    return subprocess.run(
        ["make", "setup", *arguments], cwd=checkout, env=inherited | off_line, capture_output=True, text=True
    )


def output(python: Path, code: str) -> str:
    result = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd="/", check=True)
    return result.stdout.strip()


def test_a_newer_torch_is_kept_and_set_up_heals_itself(
    checkout: Path, stand_in: Callable[[str | None], Path], tmp_path: Path
) -> None:
    python, venv = stand_in("2.99.0"), tmp_path / "venv"
    arguments = (f"PYTHON={python}", f"VENV={venv}")
    result = make(checkout, *arguments)
    assert result.returncode == 0, result.stderr
    assert f"keeping torch 2.99.0 of {python}" in result.stderr
    assert "include-system-site-packages = true" in (venv / "pyvenv.cfg").read_text()
    kept = output(venv / "bin/python", "import torch; print(torch.__version__, torch.__file__)")
    assert kept.startswith("2.99.0 ") and Path(kept.split()[1]).is_relative_to(python.parents[1])
    assert not list(venv.glob("lib/python*/site-packages/torch*"))  # none of its own
    assert "torch==" not in (venv / "constraints.txt").read_text()
    listing = [str(venv / "bin/collie"), "plugins"]
    assert "native" in subprocess.run(listing, capture_output=True, text=True, check=True).stdout

    again = make(checkout, *arguments)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")  # fresh: nothing to do

    project = checkout / "collie_monitors/csv_monitor/pyproject.toml"
    project.write_text(project.read_text().replace("\ncsv = ", "\ncomma = "))
    assert make(checkout, *arguments).returncode == 0
    listed = subprocess.run(listing, capture_output=True, text=True, check=True).stdout
    assert "comma" in listed and " csv " not in listed


def test_an_older_torch_ends_with_one_line(
    checkout: Path, stand_in: Callable[[str | None], Path], tmp_path: Path
) -> None:
    python = stand_in("2.4.1")
    for asked in ([], ["TORCH=keep"]):
        result = make(checkout, f"PYTHON={python}", f"VENV={tmp_path / 'venv'}", *asked)
        told = [line for line in result.stderr.splitlines() if not line.startswith("make: ***")]
        assert result.returncode != 0 and not (tmp_path / "venv").exists()
        assert told == [
            f"make setup: {python} has torch 2.4.1, and CoLLiE needs torch >= 2.11: "
            "upgrade it, or install our own beside it with TORCH=pin"
        ]


def test_the_pin_holds_without_a_torch_or_when_asked(
    checkout: Path, stand_in: Callable[[str | None], Path], tmp_path: Path
) -> None:
    def choice(python: Path, asked: str | None) -> str:
        code = "import sys; sys.path.insert(0, 'tools'); from make_venv import choose_mode; "
        code += f"print(choose_mode({asked!r}))"
        result = subprocess.run(
            [python, "-c", code], capture_output=True, text=True, cwd=checkout, check=True
        )
        return result.stdout.strip()

    without, older = stand_in(None), stand_in("2.4.1")
    assert choice(without, None) == choice(without, "pin") == choice(older, "pin") == "pin"
    result = make(checkout, f"PYTHON={without}", f"VENV={tmp_path / 'venv'}", "TORCH=keep")
    assert f"TORCH=keep, but {without} has no torch; CoLLiE needs torch >= 2.11" in result.stderr
