"""The benchmarks of operations run on the CPU, in small, and write what they print."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def rows(name: str, arguments: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    output = folder / "rows.json"
    monkeypatch.setattr(sys, "argv", [name, *arguments.split(), "--device", "cpu", "--output", str(output)])
    runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
    found: list[dict[str, Any]] = json.loads(output.read_text())["rows"]
    return found


def test_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = "--shapes 2x64 --heads 4 --kv-heads 2 --width 16 --windows 1 --window 1"
    found = rows("attention.py", small, tmp_path, monkeypatch)
    assert {row["case"] for row in found} == {"2 x 64", "2 x 64, packed"}
    measured = {row["name"] for row in found if row.get("ms", 0) > 0}
    assert {"sdpa", "reference"} <= measured
    reasons = {row["name"]: row["reason"] for row in found if "reason" in row}
    assert reasons["cudnn"] == "needs a CUDA device, and this run is on cpu"


def test_recompute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = "--shapes 1x32 --width 32 --heads 2 --blocks 2 --windows 1 --window 1 --no-compile"
    found = rows("recompute.py", small, tmp_path, monkeypatch)
    assert [row["mode"] for row in found] == ["none", "selective", "full", "offload"]
    assert all(row["ms_a_block"] > 0 for row in found)
