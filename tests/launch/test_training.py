"""Real training as several processes: the losses of one process, stopped and resumed, and killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from training_helpers import config, losses

COLLIE = (sys.executable, "-m", "collie_core", "train", "run.yaml")
SLOW_SAVE = """
import time
from dataclasses import dataclass
from collie_core.hookspecs import hookimpl

class SlowSave:
    collie_api = 1
    @dataclass(frozen=True)
    class Options:
        seconds: float
    def __init__(self, options): self.seconds = options.seconds
    @hookimpl
    def collie_checkpoint_saving(self, run):
        if run.rank == 0:
            print("saving", flush=True)
            time.sleep(self.seconds)

class SlowCheck:
    collie_api = 1
    @dataclass(frozen=True)
    class Options:
        pass
    def __init__(self, options): pass
    @hookimpl
    def collie_check(self):
        print("checking", flush=True)
        time.sleep(60)
        return []

class StopOnOne:
    collie_api = 1
    @dataclass(frozen=True)
    class Options:
        event: str
        rank: int = 1
    def __init__(self, options): self.options = options
    def _at(self, run, event, step):
        if run.rank == self.options.rank and event == self.options.event and step == 4:
            run.stop("one process asked for it")
    @hookimpl
    def collie_step_end(self, run, step): self._at(run, "step_end", step)
    @hookimpl
    def collie_evaluate_end(self, run, step): self._at(run, "evaluate_end", step)
    @hookimpl
    def collie_checkpoint_saved(self, run, step): self._at(run, "checkpoint_saved", step)
"""


@pytest.fixture
def folder(tiny_llama: Path, data_file: Path, tmp_path: Path) -> Path:
    """A folder with `run.yaml`, a run of 40 steps, and the plugins of `slow_save.py`."""
    mapping = config(
        tiny_llama,
        data_file,
        Path("out"),
        train={"global_batch_size": 4, "micro_batch_size": 2, "epochs": 4},
        monitors=["console"],
    ).to_mapping()
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(mapping))
    (tmp_path / "slow_save.py").write_text(SLOW_SAVE)
    metadata = tmp_path / "slow_save-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: slow-save\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[collie.plugins]\nslow_save = slow_save:SlowSave\nstop_on_one = slow_save:StopOnOne\n"
        "slow_check = slow_save:SlowCheck\n"
    )
    return tmp_path


def start(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    places = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [*COLLIE, *overrides],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": places},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def steps(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.exists() else 0


def until_step(step: int, process: subprocess.Popen[str], out: Path) -> None:
    deadline = time.monotonic() + 180  # on a busy GPU the first step compiles for a minute
    while steps(out) < step:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)


def ranks(launcher: int) -> list[int]:
    """Process ids of the ranks, in the order in which they were started."""
    shown = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in shown.splitlines()[1:]]
    return sorted(pid for pid, parent in pairs if parent == launcher)


def test_two_processes_stopped_and_resumed_have_the_losses_of_one(folder: Path) -> None:
    alone = start(folder, "output_dir=alone")
    assert alone.wait(120) == 0
    slow = "plugins=[{name: slow_save, seconds: 3}]"
    process = start(folder, "dp_size=2", slow)
    until_step(5, process, folder / "out")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert err.count("stopped by SIGTERM after step") == 1 and "error" not in err and out.count("saving") == 1
    stopped_at = steps(folder / "out")
    assert stopped_at < 40 and [path.name for path in (folder / "out" / "checkpoints").iterdir()] == [
        f"step_{stopped_at:06}"
    ]
    resumed = start(folder, "dp_size=2", slow, "--json")
    out, err = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, err
    assert json.loads(out.splitlines()[-1])["step"] == 40 and err.count("finished: ") == 1
    assert losses(folder / "out") == pytest.approx(losses(folder / "alone"), rel=2e-6)


def test_the_death_of_a_process_in_a_step_ends_the_run(folder: Path) -> None:
    process = start(folder, "pp_size=2", "train.epochs=1000")
    until_step(5, process, folder / "out")
    first, second = ranks(process.pid)
    started = time.monotonic()
    os.kill(second, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and time.monotonic() - started < 30
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and f"rank 1: process {second} was killed by SIGKILL" in errors[0]
    assert not Path(f"/proc/{first}").exists()


def test_a_process_frozen_in_a_step_ends_the_run(folder: Path) -> None:
    process = start(folder, "dp_size=2", "train.epochs=1000")
    until_step(5, process, folder / "out")
    frozen = ranks(process.pid)[0]
    started = time.monotonic()
    os.kill(frozen, signal.SIGSTOP)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and time.monotonic() - started < 30
    assert f"error: rank 0: process {frozen}" in err and "no life" in err


def test_a_mistake_that_the_processes_find_is_told_once(folder: Path) -> None:
    process = start(folder, "dp_size=2", "train.trainable=[nothing]")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and err.count("'nothing' matches no parameter") == 1
    assert err.count("error:") == 1


@pytest.mark.parametrize(
    ("event", "rank", "last"), [("step_end", 1, 4), ("evaluate_end", 1, 4), ("checkpoint_saved", 0, 5)]
)
def test_a_stop_asked_on_one_process_ends_all_with_a_checkpoint(
    folder: Path, event: str, rank: int, last: int
) -> None:
    data = yaml.safe_load((folder / "run.yaml").read_text())["data"]["train"][0]["path"]
    every = 4 if event == "evaluate_end" else 3  # after an evaluation they agree too
    overrides = [f"data.eval={data}", f"evaluate.every_steps={every}", "checkpoint.every_steps=4"]
    stopper = f"plugins=[{{name: stop_on_one, event: {event}, rank: {rank}}}]"
    process = start(folder, "dp_size=2", *overrides, stopper, "--json")
    out, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    assert json.loads(out.splitlines()[-1])["step"] == last == steps(folder / "out")
    assert (folder / "out" / "checkpoints" / f"step_{last:06}").is_dir()
    assert (folder / "out" / "model" / "config.json").is_file()


def test_an_interrupt_outside_the_loop_ends_at_once(folder: Path) -> None:
    process = start(folder, "plugins=[slow_check]")
    assert process.stdout and process.stdout.readline() == "checking\n"
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=50)
    assert process.returncode == 130 and time.monotonic() - started < 30
    assert err.splitlines()[-2:] == ["SIGINT: the run ends now", "interrupted"]
    assert not (folder / "out").exists()


def test_each_process_writes_its_profile_and_eval_needs_no_training_data(folder: Path) -> None:
    data = yaml.safe_load((folder / "run.yaml").read_text())["data"]["train"][0]["path"]
    process = start(folder, "dp_size=2", "train.max_steps=4", "--profile", "1")
    _, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    names = sorted(path.name for path in (folder / "out" / "profile").iterdir())
    assert names == ["trace_rank_0.json", "trace_rank_1.json"]
    assert all(json.loads((folder / "out" / "profile" / name).read_text())["traceEvents"] for name in names)
    overrides = ["dp_size=2", "data.train=missing.jsonl", f"data.eval={data}", "--model", "out", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "collie_core", "eval", "run.yaml", *overrides],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["perplexity/tokens"] > 100
