"""The DeepSpeed layout against one native process: real processes, real DeepSpeed, on the CPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from training_helpers import all_lines, largest_difference, losses, metrics, weights

pytest.importorskip("deepspeed")

JOBS = Path(__file__).with_name("deepspeed_jobs.py")
LR, STEPS = 1e-4, 5
PROMPT = [1, 50, 60, 70, 80]


def config(model: Path, data: Path, out: Path, /, **changes: Any) -> dict[str, Any]:
    """AdamW with clipping and uneven lengths: 8 rows a step, in two micro-batches on each of two ranks."""
    dp = changes.get("dp_size", 1)
    base: dict[str, Any] = {
        "model": {"path": str(model), "dtype": "float32"},
        "optimizer": {
            "name": "adamw",
            "lr": LR,
            "clip_grad_norm": 0.5,
            "param_groups": [{"params": "*norm*", "lr": 2 * LR}],
        },
        "schedule": {"name": "linear", "warmup_steps": 2},
        "data": {"train": str(data), "eval": str(data), "max_length": 64},
        "evaluate": {"every_steps": 2, "micro_batch_size": 3},
        "checkpoint": {"every_steps": 3, "keep": 9},
        "train": {
            "micro_batch_size": 4 // dp,
            "gradient_accumulation_steps": 2,
            "max_steps": STEPS,
        },
        "monitors": [],
        "output_dir": str(out),
    }
    for key, value in changes.items():
        merges = isinstance(value, dict) and isinstance(base.get(key), dict) and "name" not in value
        base[key] = {**base[key], **value} if merges else value
    return base


def run(folder: Path, trainings: list[dict[str, Any]], processes: int) -> list[Any]:
    """Run a job; what its first rank printed, a value a line."""
    job = folder / "job.json"
    job.write_text(json.dumps(trainings))
    command = [sys.executable, str(JOBS), str(job)]
    if processes > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*launcher, f"--nproc-per-node={processes}", *command[1:]]
    home = folder / "home"
    home.mkdir(exist_ok=True)
    environment = {**os.environ, "HOME": str(home), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": ""}
    for name in ("DS_ACCELERATOR", "TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"):
        environment.pop(name, None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    assert not list(home.iterdir()), "something was written into the user's home"
    return [json.loads(line) for line in done.stdout.splitlines()]


def deepspeed(stage: int, **options: Any) -> dict[str, Any]:
    """Keys of a config for two ranks under DeepSpeed."""
    return {"dp_size": 2, "layout": {"name": "deepspeed", "zero_stage": stage, **options}}


@dataclass
class Runs:
    """Output folders by name, and what each layout printed: generated tokens and evaluated figures."""

    folder: Path
    printed: dict[str, list[Any]]

    def __getitem__(self, name: str) -> Path:
        return self.folder / name


LORA = {"adapters": [{"name": "lora", "r": 4}]}
NO_CPU_ADAM = {"zero_force_ds_cpu_optimizer": False}
STAGES = {f"zero{stage}": deepspeed(stage) for stage in range(4)}
CASES: dict[str, dict[str, Any]] = {
    **STAGES,
    "offload2": deepspeed(2, offload="optimizer", ds_config=NO_CPU_ADAM),
    "offload3_recompute": {
        **deepspeed(3, offload="cpu", ds_config=NO_CPU_ADAM),
        "train": {"activation_checkpointing": "full"},
    },
}


def interrupted(source: Path, target: Path) -> Path:
    """A copy of a run as it stood after its third step."""
    shutil.copytree(source, target)
    shutil.rmtree(target / "model")
    shutil.rmtree(target / "checkpoints" / f"step_{STEPS:06d}")
    return target


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, data: Path) -> Runs:
    folder = tmp_path_factory.mktemp("deepspeed")

    def one(name: str, **changes: Any) -> dict[str, Any]:
        return {"config": config(tiny_llama, data, folder / name, **{"data": {"eval": None}, **changes})}

    def evaluated(name: str, **changes: Any) -> dict[str, Any]:
        return {**one(name, data={}, **changes), "prompt": PROMPT}

    native = [
        evaluated("native"),
        one("native_bf16", model={"dtype": "bfloat16"}),
        one("native_lora", **LORA),
        {**one("alone", layout={"name": "deepspeed", "zero_stage": 2})},
        {**one("alone_again", layout={"name": "deepspeed", "zero_stage": 3})},
        one("native_afterwards"),
        {**one("native_nan", train={"on_nan": "skip"}), "nan_at": 2},
    ]
    printed = {"native": run(folder, native, 1)}
    jobs = [(evaluated if name in STAGES else one)(name, **changes) for name, changes in CASES.items()]
    for stage in (2, 3):
        jobs.append(one(f"bf16_{stage}", model={"dtype": "bfloat16"}, **deepspeed(stage)))
    for stage in (0, 2, 3):
        jobs.append(one(f"lora{stage}", **LORA, **deepspeed(stage)))
        poisoned = one(f"nan{stage}", train={"on_nan": "skip"}, **deepspeed(stage))
        jobs.append({**poisoned, "nan_at": 2})
    lines = run(folder, jobs, 2)
    printed |= {name: lines[2 * stage : 2 * stage + 2] for stage, name in enumerate(STAGES)}
    resumed = []
    for stage in range(4):
        interrupted(folder / f"zero{stage}", folder / f"resumed{stage}")
        resumed.append(one(f"resumed{stage}", data={}, **deepspeed(stage)))
    interrupted(folder / "bf16_2", folder / "resumed_bf16")
    resumed.append(one("resumed_bf16", model={"dtype": "bfloat16"}, **deepspeed(2)))
    interrupted(folder / "native", folder / "from_native")
    resumed.append(one("from_native", data={}, **deepspeed(3)))
    interrupted(folder / "zero1", folder / "other_stage")
    resumed.append(one("other_stage", data={}, **deepspeed(3)))
    run(folder, resumed, 2)
    interrupted(folder / "zero3", folder / "to_native")
    run(folder, [one("to_native", data={})], 1)
    return Runs(folder, printed)


def assert_equal_runs(one: Path, other: Path) -> None:
    expected, found = losses(one), losses(other)
    assert len(found) == STEPS
    assert found == pytest.approx(expected, rel=2e-6)
    norms = [line["grad_norm"] for line in metrics(one)]
    assert [line["grad_norm"] for line in metrics(other)] == pytest.approx(norms, rel=2e-5)
    assert largest_difference(weights(one), weights(other)) < 1e-2 * LR * STEPS


@pytest.mark.parametrize("name", [*CASES, "alone", "alone_again", "native_afterwards"])
def test_training_equals_one_native_process(runs: Runs, name: str) -> None:
    assert max(line["grad_norm"] for line in metrics(runs["native"])) > 0.5  # it is clipped
    assert_equal_runs(runs["native"], runs[name])


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_adapters_train_as_on_one_native_process(runs: Runs, stage: int) -> None:
    assert_equal_runs(runs["native_lora"], runs[f"lora{stage}"])


@pytest.mark.parametrize("name", STAGES)
def test_evaluation_equals_one_native_process(runs: Runs, name: str) -> None:
    def evaluations(out: Path) -> list[dict[str, float]]:
        return [line for line in all_lines(out) if "loss" not in line]

    expected, found = evaluations(runs["native"]), evaluations(runs[name])
    assert len(found) == len(expected) > 1
    for one, other in zip(expected, found, strict=True):
        assert other == pytest.approx(one, rel=2e-6)
    assert runs.printed[name][1] == pytest.approx(runs.printed["native"][1], rel=2e-6)


@pytest.mark.parametrize("name", STAGES)
def test_generation_gives_the_same_tokens(runs: Runs, name: str) -> None:
    assert len(runs.printed[name][0][0]) == len(PROMPT) + 8
    assert runs.printed[name][0] == runs.printed["native"][0]


@pytest.mark.parametrize("stage", [2, 3])
def test_bf16_trains_near_one_native_process(runs: Runs, stage: int) -> None:
    """Only near: DeepSpeed updates fp32 masters, the native layout rounds stochastically."""
    assert losses(runs[f"bf16_{stage}"]) == pytest.approx(losses(runs["native_bf16"]), rel=3e-3)
    model = runs[f"bf16_{stage}"] / "model"
    tensors = load_file(next(model.glob("*.safetensors")))
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.bfloat16"}


@pytest.mark.parametrize(
    ("name", "whole"),
    [*((f"resumed{stage}", f"zero{stage}") for stage in range(4)), ("resumed_bf16", "bf16_2")],
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(runs: Runs, name: str, whole: str) -> None:
    assert losses(runs[name]) == losses(runs[whole])
    assert largest_difference(weights(runs[name]), weights(runs[whole])) == 0


@pytest.mark.parametrize("name", ["from_native", "to_native", "other_stage"])
def test_checkpoints_are_read_under_another_layout(runs: Runs, name: str) -> None:
    assert_equal_runs(runs["native"], runs[name])


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_by_all(runs: Runs, stage: int) -> None:
    expected, found = losses(runs["native_nan"]), losses(runs[f"nan{stage}"])
    assert found[1] is expected[1] is None  # as the record of a figure that is not finite
    assert found[2:] == pytest.approx(expected[2:], rel=2e-6)
    assert largest_difference(weights(runs["native_nan"]), weights(runs[f"nan{stage}"])) < 1e-2 * LR * STEPS


def test_a_checkpoint_alone_exports_to_the_same_files(runs: Runs, tmp_path: Path) -> None:
    out = tmp_path / "exported"
    checkpoint = runs["zero3"] / "checkpoints" / f"step_{STEPS:06d}"
    command = [sys.executable, "-m", "collie_core", "export", str(checkpoint), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    exported = load_file(next(out.glob("*.safetensors")))
    assert largest_difference(exported, weights(runs["zero3"])) == 0


def test_the_config_that_deepspeed_got_is_recorded(runs: Runs) -> None:
    recorded = json.loads((runs["zero2"] / "run.json").read_text())["resolved"]["layout.ds_config"]
    assert recorded["gradient_clipping"] == 0.5
    assert recorded["zero_optimization"]["stage"] == 2
    assert recorded["train_batch_size"] == 8
