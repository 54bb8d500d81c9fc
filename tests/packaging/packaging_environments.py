"""Fresh environments that see the libraries of this one but none of our distributions."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECTS = sorted(file.parent for file in ROOT.glob("collie_*/**/pyproject.toml"))


def names_of_ours() -> set[str]:
    """Distribution names of this repository."""
    files = [ROOT / "pyproject.toml", *(project / "pyproject.toml" for project in PROJECTS)]
    return {tomllib.loads(file.read_text())["project"]["name"] for file in files}


@dataclass(frozen=True)
class Environment:
    """A virtual environment; `libraries` is the folder of links to the libraries that it may import."""

    folder: Path
    libraries: Path
    wheels: Path

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables of its commands: its programs first, nothing of this process's path."""
        kept = {
            k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "COLLIE_PLUGINS")
        }
        own = {
            "PATH": f"{self.folder / 'bin'}:{kept['PATH']}",
            "WANDB_MODE": "offline",
            "OMP_NUM_THREADS": "1",
        }
        return kept | own

    def run(self, *command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
        """Run a command of the environment, such as `collie`."""
        return subprocess.run(command, cwd=cwd, env=self.variables, capture_output=True, text=True)

    def pip(self, *arguments: str) -> None:
        """Run the pip of this process on the environment; it reaches no index."""
        pip = [sys.executable, "-m", "pip", "--python", str(self.folder / "bin" / "python"), "-q"]
        subprocess.run([*pip, *arguments], check=True, env=self.variables)

    def install(self, *names: str) -> None:
        """Install distributions from the wheels; what they require must be there."""
        self.pip("install", "--no-index", "--find-links", str(self.wheels), *names)

    def add_library(self, name: str) -> None:
        """Let the environment see one more library of this process, as if it had been installed."""
        link_libraries(self.libraries, lambda entry: entry.split("-")[0] == name)


def link_libraries(folder: Path, wanted: Callable[[str], bool]) -> None:
    """Links to the entries of this process's site-packages; what comes first on the path wins."""
    for place in (
        Path(place) for place in sys.path if Path(place).name in ("site-packages", "dist-packages")
    ):
        for entry in place.iterdir():
            link = folder / entry.name
            if entry.suffix != ".pth" and not link.is_symlink() and wanted(entry.name):
                link.symlink_to(entry)
