"""metrics.jsonl: strict JSON, whole lines, each step once however the run was interrupted."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from collie_core.monitors.metrics_file import MetricsFile


def test_lines_come_back_as_they_were_given(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    assert file.read() == []
    lines = [{"step": 1, "loss": 0.1 + 0.2, "tokens": 12}, {"step": 1, "perplexity/perplexity": 3.5}]
    for line in lines:
        file.append(line)
    assert file.read() == lines
    assert [json.loads(line) for line in file.path.read_text().splitlines()] == lines


def test_figures_that_are_not_finite_are_null(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append({"step": 3, "loss": math.nan, "grad_norm": math.inf, "lr": 0.5})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(file.path.read_text(), parse_constant=refuse) == {
        "step": 3,
        "loss": None,
        "grad_norm": None,
        "lr": 0.5,
    }


def test_truncate_drops_later_steps_and_keeps_the_rest_byte_for_byte(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.truncate_after(4)  # nothing there: nothing happens
    assert not file.path.exists()
    for step in range(1, 8):
        file.append({"step": step, "loss": 1 / step})
        if step % 2 == 0:
            file.append({"step": step, "perplexity/perplexity": 1 + 1 / step})
    before = file.path.read_bytes()
    file.truncate_after(4)
    assert before.startswith(file.path.read_bytes())
    assert [(line["step"], "loss" in line) for line in file.read()] == [
        (1, True),
        (2, True),
        (2, False),
        (3, True),
        (4, True),
        (4, False),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("tail", [b'{"step": 3, "lo', b'{"step": 3, "loss": 1}', b"\0\0\0\n", b'{"lr": 1}\n'])
def test_what_a_crash_leaves_behind_is_dropped(tmp_path: Path, tail: bytes) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append({"step": 1, "loss": 2.0})
    file.append({"step": 2, "loss": 1.5})
    whole = file.path.read_bytes()
    file.path.write_bytes(whole + tail)
    assert [line["step"] for line in file.read()] == [1, 2]
    file.truncate_after(2)
    assert file.path.read_bytes() == whole
    file.append({"step": 3, "loss": 1.0})
    assert [line["step"] for line in file.read()] == [1, 2, 3]


WRITER = """
import sys
from collie_core.monitors.metrics_file import MetricsFile
file, step = MetricsFile(sys.argv[1]), int(sys.argv[2])
file.truncate_after(step)
while True:
    step += 1
    file.append({"step": step, "loss": 1 / step})
"""


def test_killed_and_resumed_many_times_it_has_each_step_once(tmp_path: Path) -> None:
    path, step = tmp_path / "metrics.jsonl", 0
    for round_ in range(4):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(step)]) as process:
            deadline = time.monotonic() + 20
            while len(MetricsFile(path).read()) <= step + 20 and time.monotonic() < deadline:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
        reached = len(MetricsFile(path).read())
        assert reached > step + 20
        step = reached - 5 - round_  # the last checkpoint
    MetricsFile(path).truncate_after(step)
    assert [line["step"] for line in MetricsFile(path).read()] == list(range(1, step + 1))
