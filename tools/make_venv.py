"""Make or refresh the development environment that the Makefile uses; does nothing where it is fresh.

torch is never replaced: where the interpreter that runs this imports torch >= 2.11, the environment takes
that one (`--torch keep`); where it has none, the version of constraints.txt is installed (`--torch pin`).
The environment is fresh while no file that says what to install has changed since.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDED_TORCH = (2, 11)
NEEDED_PYTHON = (3, 11)


def main() -> int:
    """Bring the environment up to date; 0 if it is, with a message on stderr otherwise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--torch", choices=["pin", "keep"], help="default: what the environment has, else as found")
    args = parser.parse_args()
    venv: Path = args.venv.absolute()
    if sys.version_info < NEEDED_PYTHON:
        return fail(f"{sys.executable} is Python {sys.version.split()[0]}, and CoLLiE needs 3.11 or newer; give PYTHON=")
    mode = existing_mode(venv)
    if args.torch is not None and args.torch != mode or mode is None:
        try:
            mode = choose_mode(args.torch)
        except ValueError as error:
            return fail(str(error))
        create(venv, mode)
    stamp, fingerprint = venv / ".collie-stamp", current_fingerprint(venv)
    if stamp.is_file() and stamp.read_text() == fingerprint:
        return 0
    stamp.unlink(missing_ok=True)
    if not install(venv, mode):
        return 1
    stamp.write_text(fingerprint)
    print(f"set up {venv}", file=sys.stderr)
    return 0


def fail(message: str) -> int:
    """Print one line for the user; returns the exit status."""
    print(f"make setup: {message}", file=sys.stderr)
    return 2


def existing_mode(venv: Path) -> str | None:
    """`keep` or `pin` as the environment was made, or None where it is missing or its interpreter is gone."""
    config = venv / "pyvenv.cfg"
    if not config.is_file() or subprocess.run([venv / "bin/python", "-c", ""], capture_output=True).returncode:
        return None
    shared = "include-system-site-packages = true" in config.read_text()
    return "keep" if shared else "pin"


def choose_mode(asked: str | None) -> str:
    """`keep` where this interpreter has a torch that serves, else `pin`.  Raises ValueError for one too old."""
    if asked == "pin":
        return "pin"
    needed = ".".join(map(str, NEEDED_TORCH))
    found = found_torch()
    if found is None:
        if asked == "keep":
            raise ValueError(f"TORCH=keep, but {sys.executable} has no torch; CoLLiE needs torch >= {needed}")
        return "pin"
    version = tuple(int(part) for part in found.split("+")[0].split(".")[:2])
    if version < NEEDED_TORCH:
        raise ValueError(
            f"{sys.executable} has torch {found}, and CoLLiE needs torch >= {needed}: "
            "upgrade it, or install our own beside it with TORCH=pin"
        )
    print(f"keeping torch {found} of {sys.executable}", file=sys.stderr)
    return "keep"


def found_torch() -> str | None:
    """The version of the torch that this interpreter imports, or None."""
    code = "import torch; print(torch.__version__)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    return result.stdout.strip() if result.returncode == 0 else None


def create(venv: Path, mode: str) -> None:
    """A new environment; in mode keep it sees the packages of this interpreter."""
    if venv.exists() and not (venv / "pyvenv.cfg").is_file():
        raise SystemExit(f"make setup: {venv} exists and is no virtual environment; move it away, or give VENV=")
    shutil.rmtree(venv, ignore_errors=True)
    shared = ["--system-site-packages"] if mode == "keep" else []
    subprocess.run([sys.executable, "-m", "venv", *shared, venv], check=True)
    if mode == "keep" and sys.prefix != sys.base_prefix:
        # this interpreter is itself a virtual environment, which the new one does not see by itself
        folders = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
        site = subprocess.run(
            [venv / "bin/python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True, capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip
        lines = [f"import site; site.addsitedir({folder!r})" for folder in folders]
        Path(site, "collie_outer.pth").write_text("\n".join(lines) + "\n")


def current_fingerprint(venv: Path) -> str:
    """Where the environment and the checkout are, and every file that says what to install."""
    files = [*ROOT.glob("pyproject.toml"), *ROOT.glob("collie_*/**/pyproject.toml")]
    files += [ROOT / "constraints.txt", ROOT / "requirements-dev.txt", Path(__file__)]
    digest = hashlib.sha256(f"{ROOT}\n{venv}\n".encode())
    for file in sorted(files):
        digest.update(f"{file}\n".encode() + file.read_bytes())
    return digest.hexdigest() + "\n"


def install(venv: Path, mode: str) -> bool:
    """Install everything in requirements-dev.txt; False where pip failed."""
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    if mode == "keep":
        constraints = [line for line in constraints if not line.startswith("torch==")]
    chosen = venv / "constraints.txt"
    chosen.write_text("\n".join(constraints) + "\n")
    pip = [venv / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", chosen]
    steps = (["hatchling", "editables"], ["--no-build-isolation", "-r", "requirements-dev.txt"])
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return all(subprocess.run([*pip, *step], cwd=ROOT, env=environment).returncode == 0 for step in steps)


if __name__ == "__main__":
    sys.exit(main())
