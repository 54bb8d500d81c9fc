"""Make or refresh the development environment that the Makefile uses; does nothing where it is fresh.

torch is never replaced: where the interpreter that runs this imports torch >= 2.11, the environment takes
that one (`--torch keep`); where it has none, the version of constraints.txt is installed (`--torch pin`).
The environment is fresh while no file that says what to install has changed since.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDED_TORCH = (2, 11)
NEEDED_PYTHON = (3, 11)


def main() -> int:
    """Bring the environment up to date; 0 if it is, with a message on stderr otherwise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--torch", choices=["pin", "keep"], help="default: as it was made, else as found")
    parser.add_argument("--this-python", action="store_true", help="make it anew if another one made it")
    args = parser.parse_args()
    venv: Path = args.venv.absolute()
    stamp = venv / ".collie-stamp"
    mode = existing_mode(venv, args.this_python)
    if mode == "keep" and not stamp.exists():
        mode = None  # interrupted before it saw the torch to keep
    if mode is None or args.torch not in (None, mode):
        if sys.version_info < NEEDED_PYTHON:
            version = sys.version.split()[0]
            return fail(f"{sys.executable} is Python {version}, and CoLLiE needs 3.11 or newer; give PYTHON=")
        try:
            mode = choose_mode(args.torch)
        except ValueError as error:
            return fail(str(error))
        create(venv, mode)
        stamp.touch()
    fingerprint = current_fingerprint(venv)
    if stamp.exists() and stamp.read_text() == fingerprint:
        return 0
    if not install(venv, mode):
        return 1
    stamp.write_text(fingerprint)
    print(f"set up {venv}", file=sys.stderr)
    return 0


def fail(message: str) -> int:
    """Print one line for the user; returns the exit status."""
    print(f"make setup: {message}", file=sys.stderr)
    return 2


def existing_mode(venv: Path, this_python: bool) -> str | None:
    """`keep` or `pin` as the environment was made; None where it must be made anew."""
    code = "import sys; print(sys.base_prefix, sys.version)"
    try:
        config = (venv / "pyvenv.cfg").read_text()
        python = subprocess.run([venv / "bin/python", "-c", code], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None  # missing, or its interpreter has gone
    if this_python and python.stdout.strip() != f"{sys.base_prefix} {sys.version}":
        return None
    return "keep" if "include-system-site-packages = true" in config else "pin"


def choose_mode(asked: str | None) -> str:
    """`keep` where this interpreter has a torch that serves, else `pin`.

    Raises ValueError for a torch that is too old, or asked for and missing.
    """
    if asked == "pin":
        return "pin"
    needed = ".".join(map(str, NEEDED_TORCH))
    found, _ = found_torch([sys.executable])
    if not found:
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


def found_torch(command: list[str | Path]) -> tuple[str, str]:
    """Version and place of the torch that an interpreter imports, or two empty texts."""
    code = "import torch; print(torch.__version__); print(torch.__file__)"
    result = subprocess.run([*command, "-c", code], capture_output=True, text=True, cwd="/")
    if result.returncode:
        return "", ""
    version, file = result.stdout.splitlines()[-2:]
    return version, str(Path(file).parent.parent)


def create(venv: Path, mode: str) -> None:
    """A new environment; in mode keep it sees the packages of this interpreter."""
    if venv.exists() and not (venv / "pyvenv.cfg").is_file():
        raise SystemExit(f"make setup: {venv} is no virtual environment; move it away, or give VENV=")
    shutil.rmtree(venv, ignore_errors=True)
    options = ["--system-site-packages"] if mode == "keep" else []
    if importlib.util.find_spec("ensurepip"):
        subprocess.run([sys.executable, "-m", "venv", *options, venv], check=True)
    else:  # Debian's python3 without python3-venv
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", *options, venv], check=True)
        pip = [sys.executable, "-m", "pip", "--python", str(venv / "bin/python")]
        subprocess.run([*pip, "install", "-q", "pip"], check=True)
    if mode == "keep":
        show_torch(venv)


def show_torch(venv: Path) -> None:
    """Let the environment see this interpreter's torch, be it in a venv of its own or on PYTHONPATH."""
    found, place = found_torch([sys.executable])
    python = venv / "bin/python"
    (site,) = venv.glob("lib/python*/site-packages")
    if found_torch([python, "-E"]) != (found, place):
        (site / "collie_outer.pth").write_text(place + "\n")
    if found_torch([python, "-E"]) != (found, place):
        raise SystemExit(f"make setup: {venv} cannot be made to see torch {found} in {place}; use TORCH=pin")
    code = "import importlib.metadata as metadata; metadata.version('torch')"
    if subprocess.run([python, "-E", "-c", code], capture_output=True).returncode:
        # built by hand, without metadata: pip must not think that there is none
        info = site / f"torch-{found}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {found}\n")


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
    pip = [str(venv / "bin/python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    builders = ["hatchling", "editables", "setuptools", "wheel"]  # the last two for deepspeed, a source
    for step in (builders, ["--no-build-isolation", "-r", "requirements-dev.txt"]):
        if subprocess.run([*pip, "-c", str(chosen), *step], cwd=ROOT, env=environment).returncode:
            return False
    return True


if __name__ == "__main__":
    sys.exit(main())
