"""Real wheels, and fresh environments to install them into."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from packaging_environments import PROJECTS, ROOT, Environment, link_libraries, names_of_ours


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel of each of our distributions and of the stranger's."""
    folder = tmp_path_factory.mktemp("dist")
    sources = [*PROJECTS, ROOT, ROOT / "examples" / "third_party"]
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", folder, *sources], check=True)
    return folder


@pytest.fixture(scope="session")
def make_environment(tmp_path_factory: pytest.TempPathFactory, wheels: Path) -> Callable[..., Environment]:
    """`make_environment(without=("wandb",))`: a fresh environment, with none of our distributions."""
    ours = {name.replace("-", "_") for name in names_of_ours()}

    def make(without: Sequence[str] = ()) -> Environment:
        place = tmp_path_factory.mktemp("environment")
        libraries = place / "libraries"
        libraries.mkdir()
        link_libraries(libraries, lambda entry: entry.split("-")[0] not in {*ours, *without})
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", place / "venv"], check=True)
        (site,) = (place / "venv" / "lib").glob("python*/site-packages")
        (site / "libraries.pth").write_text(f"{libraries}\n")
        return Environment(place / "venv", libraries, wheels)

    return make
