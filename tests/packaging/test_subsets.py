"""Fresh environments with some of our wheels: what is there works, what is not there is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging_environments import Environment

TRAIN = """
model: {{path: {model}, dtype: float32}}
optimizer: {{name: lomo, lr: 1.0e-2}}
data: {{train: {data}, max_length: 64}}
train: {{micro_batch_size: 4, max_steps: 3}}
monitors: [{monitors}]
output_dir: {output}
"""


@pytest.fixture(scope="module")
def environment(make_environment: Callable[..., Environment]) -> Environment:
    made = make_environment(without=("wandb",))
    made.install("collie-core", "collie-decoder", "collie-llama", "collie-lomo")
    return made


def config(folder: Path, model: Path, data: Path, monitors: str) -> Path:
    file = folder / f"{monitors}.yaml"
    file.write_text(TRAIN.format(model=model, data=data, monitors=monitors, output=folder / monitors))
    return file


def test_core_llama_and_lomo_alone_train(
    environment: Environment, tmp_path: Path, tiny_llama: Path, data_file: Path
) -> None:
    listed = json.loads(environment.run("collie", "plugins", "--json", cwd=tmp_path).stdout)
    assert {entry["distribution"] for entry in listed} == {"collie-core", "collie-llama", "collie-lomo"}
    for module in ("wandb", "collie_monitors.wandb_monitor", "collie_monitors"):
        assert environment.run("python", "-c", f"import {module}", cwd=tmp_path).returncode == 1
    result = environment.run(
        "collie", "train", config(tmp_path, tiny_llama, data_file, "console"), cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "console" / "model" / "config.json").is_file()
    used = json.loads((tmp_path / "console" / "run.json").read_text())["plugins"]
    site = environment.folder / "lib"
    assert {plugin["name"] for plugin in used} == {"native", "lomo", "console", "llama"}
    assert all(Path(plugin["file"]).is_relative_to(site) for plugin in used), used


def test_adding_the_wandb_wheel_makes_the_monitor_work(
    environment: Environment, tmp_path: Path, tiny_llama: Path, data_file: Path
) -> None:
    file = config(tmp_path, tiny_llama, data_file, "wandb")
    before = environment.run("collie", "train", file, cwd=tmp_path)
    assert before.returncode == 2 and "pip install collie-wandb" in before.stderr, before.stderr
    assert not (tmp_path / "wandb").exists()
    environment.add_library("wandb")
    environment.install("collie-wandb")
    result = environment.run("collie", "train", file, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert list((tmp_path / "wandb" / "wandb").rglob("*.wandb"))


def test_removing_the_lomo_wheel_is_told(
    environment: Environment, tmp_path: Path, tiny_llama: Path, data_file: Path
) -> None:
    environment.pip("uninstall", "-y", "collie-lomo")
    result = environment.run(
        "collie", "train", config(tmp_path, tiny_llama, data_file, "console"), cwd=tmp_path
    )
    assert result.returncode == 2
    message = "console.yaml:3: optimizer.name: optimizer 'lomo' is not installed: pip install collie-lomo"
    assert result.stderr.startswith("error: ") and message in result.stderr.splitlines()[0]
    assert not (tmp_path / "console").exists()
