"""benchmarks/h200.py as a smoke run: it measures, says why it does not, and writes what it found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "h200.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_a_smoke_run(tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    rows = ["lomo:float8", "lomo:lomo-optim", "adamw8bit-13b:bf16-full"]
    done = run("--window", "0.01", "--rows", *rows, "--output", str(output))
    peer, ours, refused = json.loads(output.read_text())["results"]
    assert done.returncode == 1 and "served on CUDA alone" in refused["error"]
    assert [peer["name"], ours["name"]] == ["lomo-optim", "float8"]
    for found in (peer, ours):
        assert found["tok_s"] > 0 and len(found["windows"]) == 3
        assert f"{found['tok_s']:,.0f} tok/s" in done.stdout
    assert ours["over_peer"] == ours["tok_s"] / peer["tok_s"]
    assert ours["resolved"]["float8"]["linears"] == 14


def test_what_is_not_there_is_said() -> None:
    unknown = run("--rows", "sgd")
    assert unknown.returncode == 2 and "'sgd' is none of: lomo:bf16" in unknown.stderr
    late = run("--rows", "lomo:bf16", "--time-limit", "0")
    assert late.returncode == 0 and "skipped: out of time" in late.stdout
