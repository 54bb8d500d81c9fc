"""The `collie` command: messages on stderr, results on stdout, exit statuses, no tracebacks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

import collie_core
from collie_core.cli.main import COMMANDS, main


def collie(
    *arguments: str, output: int = subprocess.PIPE, **variables: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "collie_core", *arguments],
        stdout=output,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **variables},
    )


def test_the_command_is_installed_and_tells_its_version() -> None:
    script = Path(sys.executable).with_name("collie")
    result = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert result.stdout == f"collie {collie_core.__version__}\n"
    assert metadata.version("collie-core") == collie_core.__version__


def test_help_lists_every_command() -> None:
    result = collie("--help")
    assert result.returncode == 0 and all(f"  {name} " in result.stdout for name in COMMANDS)
    assert collie().returncode == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_its_own_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0 and f"usage: collie {command}" in capsys.readouterr().out


def test_a_mistake_has_status_2_and_no_traceback(tmp_path: Path) -> None:
    result = collie("plugin")
    assert result.returncode == 2 and "unknown command 'plugin', did you mean 'plugins'?" in result.stderr
    result = collie("config", "check", str(tmp_path / "none.yaml"))
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and "Traceback" not in result.stderr
    result = collie("config", "check", str(tmp_path / "none.yaml"), COLLIE_TRACEBACK="1")
    assert result.returncode == 2 and "Traceback" in result.stderr


def test_an_interruption_has_status_130(install: Callable[..., str], site: Path) -> None:
    install("raise KeyboardInterrupt", name="impatient")
    result = collie("plugins", "--check", PYTHONPATH=str(site))
    assert (result.returncode, result.stderr) == (130, "interrupted\n")


def test_a_full_disk_and_a_closed_pipe_are_told() -> None:
    with open("/dev/full", "w") as full:
        result = collie("plugins", "--json", output=full.fileno())
    assert result.returncode == 1 and "No space left on device" in result.stderr
    assert result.stderr.startswith("error: OSError") and "Exception ignored" not in result.stderr
    reader, writer = os.pipe()
    os.close(reader)
    result = collie("plugins", "--json", output=writer)
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, "")
