"""Resume: bit-identical after a stop, a signal and kill -9; what is refused; damaged checkpoints."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from training_helpers import StopAt, all_lines, config, largest_difference, losses, metrics, weights

from collie_core import Trainer
from collie_core.checkpoint.store import read_metadata
from collie_core.checkpoint.tensor_files import TensorFiles
from collie_core.errors import CheckpointError, ConfigError, UserError

CHANGES: dict[str, Any] = {
    "model": {"dtype": "bfloat16"},
    "optimizer": {"name": "adalomo", "lr": 0.01},
    "schedule": {"name": "cosine", "warmup_steps": 3},
    "data": {"max_length": 96, "packing": True},
    "train": {"micro_batch_size": 1, "gradient_accumulation_steps": 2, "epochs": 3, "deterministic": True},
    "checkpoint": {"every_steps": 2},
    "seed": 7,
}


@pytest.fixture(scope="module")
def whole(tiny_llama: Path, records: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    Trainer(config(tiny_llama, data, folder / "out", **CHANGES)).train()
    return folder


def same_run(one: Path, other: Path) -> None:
    keys = ("step", "epoch", "loss", "lr", "grad_norm", "tokens")
    assert [[line[k] for k in keys] for line in metrics(one)] == [
        [line[k] for k in keys] for line in metrics(other)
    ]
    assert largest_difference(weights(one), weights(other)) == 0.0


@pytest.mark.parametrize("optimizer", ["adalomo", "lomo", "adamw", "sgd"])
def test_stopped_and_resumed_twice_is_bit_identical(
    tiny_llama: Path, whole: Path, tmp_path: Path, optimizer: str
) -> None:
    changes = {**CHANGES, "optimizer": {"name": optimizer, "lr": 0.01}}
    data = whole / "train.jsonl"
    expected = whole / "out"
    if optimizer != "adalomo":
        expected = tmp_path / "whole"
        Trainer(config(tiny_llama, data, expected, **changes)).train()
    steps = len(losses(expected))
    assert steps > 8
    out = tmp_path / "out"
    for stop in (3, steps - 2):
        result = Trainer(config(tiny_llama, data, out, **changes), callbacks=[StopAt(stop)]).train()
        assert result.step == stop and result.stopped_by == "the test asked for it"
    Trainer(config(tiny_llama, data, out, **changes)).train()
    same_run(expected, out)


def write_yaml(model: Path, data: Path, out: Path, path: Path, /, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump(config(model, data, out, **{**CHANGES, **changes}).to_mapping()))
    return path


# Imports once, then forks a child a trial: each child trains and is killed from outside.
ZYGOTE = """
import os, sys
import torch, transformers
import collie_core.train.setup, collie_core.layouts.native, collie_core.train.loop, collie_core.data.reader
from collie_core.config.load import load_config
from collie_core.train.trainer import Trainer
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        try:
            Trainer(load_config(line.strip())).train()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    print(child, flush=True)
    _, status = os.waitpid(child, 0)
    print(status, flush=True)
"""


def test_killed_at_random_moments_is_bit_identical(tiny_llama: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    path = write_yaml(
        tiny_llama, whole / "train.jsonl", out, tmp_path / "run.yaml", checkpoint={"every_steps": 1}
    )
    zygote = subprocess.Popen(
        [sys.executable, "-c", ZYGOTE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert zygote.stdin and zygote.stdout

    def trial(seconds: float | None) -> int:
        assert zygote.stdin and zygote.stdout
        zygote.stdin.write(f"{path}\n")
        zygote.stdin.flush()
        child = int(zygote.stdout.readline())
        if seconds is not None:
            time.sleep(seconds)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        return int(zygote.stdout.readline())

    rng = random.Random(0)
    killed = 0
    for _ in range(60):
        if killed >= 10:
            break
        status = trial(rng.uniform(0.2, 1.6))
        killed += status == signal.SIGKILL
        if status == 0:  # it had time to finish: begin again, killing earlier
            out.rename(tmp_path / f"finished_{killed}_{time.time_ns()}")
    assert killed >= 10
    assert trial(None) == 0
    zygote.stdin.close()
    zygote.wait()
    same_run(whole / "out", out)
    steps = [line["step"] for line in all_lines(out)]
    assert steps == sorted(set(steps))  # each step exactly once


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_same_command_goes_on(
    tiny_llama: Path, whole: Path, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    out = tmp_path / "out"
    path = write_yaml(tiny_llama, whole / "train.jsonl", out, tmp_path / "run.yaml", checkpoint={})
    command = [sys.executable, "-m", "collie_core", "train", str(path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.fail("the run ended before the signal came")
    assert process.returncode == status, err
    assert "Traceback" not in err
    assert len(list((out / "checkpoints").glob("step_*"))) == 1
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    same_run(whole / "out", out)


def test_a_finished_run_is_left_alone(tiny_llama: Path, whole: Path) -> None:
    files = {path: path.stat().st_mtime_ns for path in (whole / "out").rglob("*") if path.is_file()}
    result = Trainer(config(tiny_llama, whole / "train.jsonl", whole / "out", **CHANGES)).train()
    assert result.step == len(losses(whole / "out"))
    kept = {path: path.stat().st_mtime_ns for path in files if path.name != ".lock"}
    assert all(files[path] == time_ for path, time_ in kept.items())


def test_more_epochs_go_on_where_the_run_ended(tiny_llama: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    data = whole / "train.jsonl"
    constant = {**CHANGES, "schedule": {"name": "constant"}}
    Trainer(config(tiny_llama, data, out, **{**constant, "train": {**CHANGES["train"], "epochs": 1}})).train()
    done = len(losses(out))
    Trainer(config(tiny_llama, data, out, **constant)).train()
    long = tmp_path / "long"
    Trainer(config(tiny_llama, data, long, **constant)).train()
    assert done < len(losses(long))
    same_run(long, out)


def copy_of(folder: Path, target: Path) -> Path:
    import shutil

    shutil.copytree(folder, target)
    (target / ".lock").unlink()
    return target


def test_a_changed_config_is_refused_by_name(tiny_llama: Path, whole: Path, tmp_path: Path) -> None:
    out = copy_of(whole / "out", tmp_path / "out")
    changed = {**CHANGES, "optimizer": {"name": "adalomo", "lr": 0.02}, "seed": 8}
    with pytest.raises(ConfigError) as caught:
        Trainer(config(tiny_llama, whole / "train.jsonl", out, **changed)).train()
    assert "optimizer.lr: is 0.02, but the run to resume has 0.01" in str(caught.value)
    assert "seed: is 8" in str(caught.value)


def test_never_and_foreign_folders_are_refused(tiny_llama: Path, whole: Path, tmp_path: Path) -> None:
    out = copy_of(whole / "out", tmp_path / "out")
    with pytest.raises(ConfigError, match="is not empty"):
        Trainer(
            config(tiny_llama, whole / "train.jsonl", out, **{**CHANGES, "checkpoint": {"resume": "never"}})
        ).train()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="no run's folder"):
        Trainer(config(tiny_llama, whole / "train.jsonl", foreign, **CHANGES)).train()
    assert [path.name for path in foreign.iterdir()] == ["thesis.txt"]


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tiny_llama: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    data = whole / "train.jsonl"
    Trainer(config(tiny_llama, data, out, **CHANGES), callbacks=[StopAt(5)]).train()
    newest = sorted((out / "checkpoints").glob("step_*"))[-1]
    tensors = next(newest.glob("*.safetensors"))
    content = bytearray(tensors.read_bytes())
    content[-100] ^= 0x10
    tensors.write_bytes(content)
    with pytest.raises(CheckpointError, match=newest.name):
        Trainer(config(tiny_llama, data, out, **{**CHANGES, "checkpoint": {"resume": str(newest)}})).train()
    Trainer(config(tiny_llama, data, out, **CHANGES)).train()
    assert newest.name in caplog.text
    same_run(whole / "out", out)


def test_resume_from_a_named_checkpoint_of_another_run(tiny_llama: Path, whole: Path, tmp_path: Path) -> None:
    data = whole / "train.jsonl"
    first = tmp_path / "first"
    Trainer(config(tiny_llama, data, first, **CHANGES), callbacks=[StopAt(4)]).train()
    checkpoint = first / "checkpoints" / "step_000004"
    out = tmp_path / "second"
    Trainer(config(tiny_llama, data, out, **{**CHANGES, "checkpoint": {"resume": str(checkpoint)}})).train()
    assert losses(out) == losses(whole / "out")[4:]
    assert largest_difference(weights(out), weights(whole / "out")) == 0.0


@pytest.mark.parametrize("adapters", [[], [{"name": "lora", "r": 4, "init_lora_weights": "pissa"}]])
def test_each_tensor_of_the_checkpoint_is_read_once(
    adapters: list[Any], tiny_llama: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {**CHANGES, "adapters": adapters, "train": {**CHANGES["train"], "max_steps": 4}}
    settings = (tiny_llama, whole / "train.jsonl", tmp_path / "out")
    Trainer(config(*settings, **changes), callbacks=[StopAt(2)]).train()
    read, names = TensorFiles.read, []

    def counted(files: TensorFiles, name: str, *how: Any) -> Any:
        names.append(name)
        return read(files, name, *how)

    with monkeypatch.context() as patch:
        patch.setattr(TensorFiles, "read", counted)
        Trainer(config(*settings, **changes)).train()
    stored = read_metadata(tmp_path / "out/checkpoints/step_000002").tensors
    assert sorted(names) == sorted(stored)
    Trainer(config(*settings[:2], tmp_path / "expected", **changes)).train()
    same_run(tmp_path / "expected", tmp_path / "out")


def test_an_output_folder_in_use_is_refused(tiny_llama: Path, whole: Path, tmp_path: Path) -> None:
    from collie_core.files import OutputLock

    out = copy_of(whole / "out", tmp_path / "out")
    with OutputLock(out), pytest.raises(UserError, match="in use"):
        Trainer(config(tiny_llama, whole / "train.jsonl", out, **CHANGES)).train()
