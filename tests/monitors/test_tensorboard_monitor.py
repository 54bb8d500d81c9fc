"""Event files, read back by TensorBoard's own reader."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from collie_core.run import Run
from collie_monitors.tensorboard_monitor import TensorBoard

MakeRun = Callable[..., Run]
DRIVER = Path(__file__).with_name("drive_tensorboard.py")


def train(run: Run, last: int) -> None:
    """Steps after run.step, an evaluation at every fifth."""
    monitor = TensorBoard(TensorBoard.Options()).collie_monitor(run)
    for step in range(run.step + 1, last + 1):
        monitor.log(step, {"step": step, "epoch": 0, "loss": 1 / step, "lr": 0.5})
        if step % 5 == 0:
            monitor.log(step, {"perplexity/perplexity": math.exp(1 / step)})
    monitor.text(last, "sample", "a [sample] of **text**")
    monitor.close(None)


def read(run: Run) -> EventAccumulator:
    folder = str(run.output_dir / "tensorboard")
    accumulator = EventAccumulator(folder, size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def curve(accumulator: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def texts(accumulator: EventAccumulator, tag: str) -> list[tuple[int, str]]:
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in accumulator.Tensors(tag)]


def test_every_figure_is_a_curve_and_every_text_a_text(make_run: MakeRun) -> None:
    run = make_run()
    train(run, 10)
    accumulator = read(run)
    assert sorted(accumulator.Tags()["scalars"]) == ["epoch", "loss", "lr", "perplexity/perplexity"]
    assert curve(accumulator, "loss") == [(n, pytest.approx(1 / n)) for n in range(1, 11)]
    assert curve(accumulator, "perplexity/perplexity") == [
        (n, pytest.approx(math.exp(1 / n))) for n in (5, 10)
    ]
    assert texts(accumulator, "sample") == [(10, "a [sample] of **text**")]
    [(step, config)] = texts(accumulator, "config")
    assert step == 0 and "path: some/model" in config and "seed: 7" in config
    assert accumulator.SummaryMetadata("config").plugin_data.plugin_name == "text"


def test_a_killed_and_resumed_run_has_each_step_once(make_run: MakeRun) -> None:
    run = make_run(step=20)
    killed = subprocess.run([sys.executable, str(DRIVER), str(run.output_dir), "26"])
    assert killed.returncode == -signal.SIGKILL
    assert [step for step, _ in curve(read(run), "loss")] == list(range(1, 27))
    [event_file] = (run.output_dir / "tensorboard").iterdir()
    event_file.write_bytes(event_file.read_bytes() + b"cut short")
    train(run, 30)
    train(make_run(step=25), 40)
    assert curve(read(run), "loss") == [(n, pytest.approx(1 / n)) for n in range(1, 41)]


def test_a_run_that_begins_anew_forgets_the_steps_of_the_first_attempt(make_run: MakeRun) -> None:
    train(make_run(), 7)
    train(make_run(), 4)
    assert [step for step, _ in curve(read(make_run()), "loss")] == [1, 2, 3, 4]


def test_the_package_is_looked_for_before_the_run_starts() -> None:
    assert TensorBoard(TensorBoard.Options()).collie_check() == []
