"""What a user sees of a run: plain lines in a log, a live bar on a terminal."""

from __future__ import annotations

import fcntl
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from collie_core.config.problems import ConfigProblems
from collie_core.monitors.console import Console, amount, duration, figure
from collie_core.registry.options import validate_options
from collie_core.run import Run

MakeRun = Callable[..., Run]
DRIVER = Path(__file__).with_name("drive_console.py")
FIGURES = {"epoch": 0, "lr": 3e-4, "tokens_per_second": 12345.6, "peak_memory_gib": 1.5}


def train(run: Run, every_steps: int | None = None) -> None:
    """All steps after run.step, with an evaluation at every hundredth."""
    plugin = Console(Console.Options(every_steps))
    monitor = plugin.collie_monitor(run)
    plugin.collie_run_start()
    for step in range(run.step + 1, run.total_steps + 1):
        monitor.log(step, {"step": step, "loss": 2 / step, **FIGURES})
        if step % 100 == 0:
            monitor.log(step, {"perplexity/perplexity": math.exp(1 / step), "perplexity/tokens": 123456})
        run.step = step
    plugin.collie_checkpoint_saved(run.output_dir / "checkpoints" / "step_000200")
    plugin.collie_exported(run.output_dir / "model")
    monitor.close(None)


def test_a_log_has_lines_on_stderr_alone(make_run: MakeRun, capfd: pytest.CaptureFixture[str]) -> None:
    run = make_run(total_steps=200)
    train(run)
    out, err = capfd.readouterr()
    assert out == ""
    assert "\x1b" not in err and "\r" not in err
    lines = err.splitlines()
    assert lines[0] == f"{run.output_dir}: training 200 steps"
    steps = [line for line in lines if re.match(r"step [\d,]+/200 ", line)]
    assert [int(line.split()[1].split("/")[0]) for line in steps] == [1, *range(10, 201, 10)]
    assert re.fullmatch(
        r"step 100/200  loss 0\.02000  lr 3\.00e-04  12\.3k tokens/s  1\.50 GiB  eta 0:00:0\d", steps[10]
    )
    assert "step 200  perplexity/perplexity 1.005  perplexity/tokens 123,456" in lines
    assert f"checkpoint saved: {run.output_dir}/checkpoints/step_000200" in lines
    assert f"model written: {run.output_dir}/model" in lines
    last = r"finished: 200 steps in 0:00:0\d, loss 0\.01000, perplexity/perplexity 1\.005"
    assert re.fullmatch(last, lines[-1])


def test_a_line_every_so_many_steps(make_run: MakeRun, capfd: pytest.CaptureFixture[str]) -> None:
    train(make_run(total_steps=200), every_steps=75)
    assert re.findall(r"^step (\d+)/200", capfd.readouterr().err, re.MULTILINE) == ["75", "150"]


def test_a_resumed_run_counts_from_where_it_was(make_run: MakeRun, capfd: pytest.CaptureFixture[str]) -> None:
    train(make_run(step=1150, total_steps=1200))
    err = capfd.readouterr().err
    assert "resuming after step 1,150 of 1,200 steps" in err
    assert "finished: 50 steps" in err


@pytest.mark.parametrize(
    ("error", "reason", "expected"),
    [
        (RuntimeError("x"), None, "failed after step 3 (RuntimeError): 3 steps"),
        (None, "the loss is low enough", "stopped after step 3 of 40 (the loss is low enough): 3 steps"),
        (None, None, "stopped after step 3 of 40: 3 steps"),
    ],
)
def test_the_last_line_says_how_the_run_ended(
    make_run: MakeRun,
    capfd: pytest.CaptureFixture[str],
    error: Exception | None,
    reason: str | None,
    expected: str,
) -> None:
    run = make_run()
    monitor = Console(Console.Options()).collie_monitor(run)
    run.step, run.stop_reason = 3, reason
    monitor.close(error)
    assert capfd.readouterr().err.startswith(expected)


def test_missing_and_strange_figures_are_fine(make_run: MakeRun, capfd: pytest.CaptureFixture[str]) -> None:
    monitor = Console(Console.Options(every_steps=1)).collie_monitor(make_run(total_steps=0))
    monitor.log(1, {"loss": math.nan})
    monitor.log(2, {"loss": math.inf, "tokens_per_second": 0.0, "peak_memory_gib": 1e9, "lr": 0.0})
    monitor.text(2, "sample", "[red]as it is[/red]")
    monitor.close(None)
    err = capfd.readouterr().err
    assert "loss nan" in err and "loss inf" in err and "[red]as it is[/red]" in err


def test_units() -> None:
    assert [amount(value) for value in (0.0, 3.14, 123.4, 999.7, 1234, 56_789, 1.5e6, 2e9)] == [
        "0.0",
        "3.1",
        "123",
        "1000",
        "1.2k",
        "56.8k",
        "1.5M",
        "2.0G",
    ]
    assert [duration(value) for value in (0, 59.6, 360_001)] == ["0:00:00", "0:01:00", "100:00:01"]
    assert [figure(value) for value in (1234567, 0.5, 12345.678)] == ["1,234,567", "0.5000", "1.235e+04"]


def test_every_steps_must_be_positive() -> None:
    assert validate_options(Console, {"every_steps": 1}) == Console.Options(every_steps=1)
    with pytest.raises(ConfigProblems, match="every_steps"):
        validate_options(Console, {"every_steps": 0})


def test_on_a_terminal_a_bar_stands_below_the_lines_at_any_width(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 200, 0, 0))
    seen = bytearray()

    def read() -> None:
        while chunk := os.read(ours, 65536):
            seen.extend(chunk)

    reader = threading.Thread(target=_until_closed, args=(read,), daemon=True)
    reader.start()
    env = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    command = [sys.executable, str(DRIVER), str(tmp_path / "demo")]
    done = subprocess.run(
        command, env={**env, "TERM": "xterm-256color"}, stdout=subprocess.PIPE, stderr=theirs, timeout=60
    )
    os.close(theirs)
    reader.join(timeout=10)
    os.close(ours)
    text = seen.decode(errors="replace")
    assert done.returncode == 0, text
    assert done.stdout == b"a result\n"
    assert "━" in text and "8/8" in text and "12.3k tokens/s" in text
    assert text.count("step 6/8") == 1 and "step 1/8" not in text
    assert "perplexity/perplexity 7.250" in text and "checkpoint saved" in text
    assert "a warning of some library" in text and "[bold]not markup[/bold]" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor is hidden and comes back
    assert re.search(r"finished: 8 steps in 0:00:\d\d, loss 0\.1250, perplexity/perplexity 7\.250\r\n$", text)


def _until_closed(read: Callable[[], None]) -> None:
    try:
        read()
    except OSError:  # the other end of the terminal is closed
        return


LIGHT = """
import sys
import collie_core.monitors.console, collie_core.monitors.metrics_file
import collie_monitors.csv_monitor, collie_monitors.tensorboard_monitor, collie_monitors.wandb_monitor
heavy = {"torch", "tensorboard", "wandb", "pydantic", "rich", "yaml"} & set(sys.modules)
assert not heavy, heavy
"""


def test_monitors_import_nothing_heavy() -> None:
    subprocess.run([sys.executable, "-c", LIGHT], check=True)
