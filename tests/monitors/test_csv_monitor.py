"""metrics.csv, read back by the csv module."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path

from collie_core.run import Run
from collie_monitors.csv_monitor import Csv

MakeRun = Callable[..., Run]


def train(run: Run, last: int) -> None:
    """Steps after run.step, an evaluation at every fifth."""
    monitor = Csv(Csv.Options()).collie_monitor(run)
    for step in range(run.step + 1, last + 1):
        monitor.log(step, {"step": step, "epoch": 0, "loss": 1 / step, "tokens": 100 * step})
        if step % 5 == 0:
            monitor.log(step, {"perplexity/perplexity": math.exp(1 / step)})
    monitor.text(last, "sample", "text, with a comma\nand a line")
    monitor.close(None)


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_every_figure_has_a_column_and_every_evaluation_a_row(make_run: MakeRun) -> None:
    run = make_run()
    train(run, 10)
    rows = read(run.output_dir / "metrics.csv")
    assert list(rows[0]) == ["step", "epoch", "loss", "tokens", "perplexity/perplexity"]
    steps = [row for row in rows if row["loss"]]
    evaluations = [row for row in rows if row["perplexity/perplexity"]]
    assert [int(row["step"]) for row in steps] == list(range(1, 11))
    assert [float(row["loss"]) for row in steps] == [1 / step for step in range(1, 11)]
    assert [int(row["tokens"]) for row in steps] == [100 * step for step in range(1, 11)]
    assert [int(row["step"]) for row in evaluations] == [5, 10]
    assert [float(row["perplexity/perplexity"]) for row in evaluations] == [math.exp(1 / 5), math.exp(1 / 10)]
    assert len(rows) == 12


def test_figures_that_are_not_finite_are_kept(make_run: MakeRun) -> None:
    run = make_run()
    monitor = Csv(Csv.Options()).collie_monitor(run)
    monitor.log(1, {"loss": math.nan, "grad_norm": math.inf})
    monitor.close(None)
    [row] = read(run.output_dir / "metrics.csv")
    assert math.isnan(float(row["loss"])) and math.isinf(float(row["grad_norm"]))


def test_a_killed_and_resumed_run_has_each_step_once(make_run: MakeRun) -> None:
    train(make_run(), 13)
    path = make_run().output_dir / "metrics.csv"
    with open(path, "a") as file:
        file.write("14,0,0.0714")  # cut short by a kill: the end of the line is missing
    train(make_run(step=10), 20)
    rows = read(path)
    assert [int(row["step"]) for row in rows if row["loss"]] == list(range(1, 21))
    assert [int(row["step"]) for row in rows if row["perplexity/perplexity"]] == [5, 10, 15, 20]
    assert [float(row["loss"]) for row in rows if row["loss"]] == [1 / step for step in range(1, 21)]


def test_a_run_that_begins_anew_begins_the_file_anew(make_run: MakeRun) -> None:
    train(make_run(), 7)
    train(make_run(), 3)
    rows = read(make_run().output_dir / "metrics.csv")
    assert [int(row["step"]) for row in rows] == [1, 2, 3]
    assert "perplexity/perplexity" not in rows[0]
