"""A stranger's wheel beside ours: train, save, reload and resume, with no file of ours touched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging_environments import Environment
from safetensors.numpy import load_file

EXAMPLE = Path(__file__).parents[2] / "examples" / "third_party"


@pytest.fixture(scope="module")
def environment(make_environment: Callable[..., Environment]) -> Environment:
    made = make_environment()
    made.install("collie-core", "acme-collie")
    return made


@pytest.fixture(scope="module")
def place(environment: Environment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example's config, model and data, and not its modules."""
    folder = tmp_path_factory.mktemp("acme")
    for name in ("prepare.py", "train.yaml"):
        shutil.copy(EXAMPLE / name, folder)
    result = environment.run("python", "prepare.py", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "acme.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == sorted({line["step"] for line in lines})
    return [line["loss"] for line in lines if "loss" in line]


def train(environment: Environment, place: Path, *overrides: str) -> None:
    result = environment.run("collie", "train", "train.yaml", *overrides, cwd=place)
    assert result.returncode == 0, result.stderr


def test_the_strangers_plugins_are_listed_and_sound(environment: Environment, place: Path) -> None:
    listed = json.loads(environment.run("collie", "plugins", "--check", "--json", cwd=place).stdout)
    theirs = {
        (entry["kind"], entry["name"], entry["version"], entry["status"])
        for entry in listed
        if entry["distribution"] == "acme-collie"
    }
    own = (("model", "acme"), ("optimizer", "signum"), ("monitor", "jsonl"))
    assert theirs == {(*plugin, "1.2.0", "ok") for plugin in own}


def test_they_train_save_and_reload(environment: Environment, place: Path) -> None:
    train(environment, place)
    found = losses(place / "work/run")
    assert found[-1] < 0.2 * found[0]
    used = json.loads((place / "work/run/run.json").read_text())["plugins"]
    assert {entry["name"] for entry in used if entry["distribution"] == "acme-collie"} == {
        "acme",
        "signum",
        "jsonl",
    }
    before = load_file(place / "work/model/model.safetensors")
    after = load_file(place / "work/run/model/model.safetensors")
    assert {name: tensor.shape for name, tensor in before.items()} == {
        name: t.shape for name, t in after.items()
    }
    prompt = "The lamp near the blue lamp is"
    result = environment.run(
        "collie", "generate", "work/run/model", "--prompt", prompt, "--dtype", "float32", cwd=place
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "blue too."


def test_a_resumed_run_is_bit_identical(environment: Environment, place: Path) -> None:
    same = ("schedule=constant", "train.epochs=2")
    train(environment, place, *same, "output_dir=work/whole")
    for more in (["train.max_steps=10"], []):
        train(environment, place, *same, "output_dir=work/resumed", *more)
    whole = losses(place / "work/whole")
    assert len(whole) > 12 and losses(place / "work/resumed") == whole
    one, other = (load_file(place / f"work/{name}/model/model.safetensors") for name in ("whole", "resumed"))
    assert all((one[name] == other[name]).all() for name in one)


def test_what_a_strangers_optimizer_cannot_serve_is_refused(environment: Environment, place: Path) -> None:
    result = environment.run(
        "collie", "train", "train.yaml", "optimizer.clip_grad_norm=1.0", "output_dir=work/refused", cwd=place
    )
    assert result.returncode == 2, result.stderr
    assert "optimizer 'signum' (acme-collie 1.2.0): optimizer.clip_grad_norm changes no sign" in result.stderr
    result = environment.run("collie", "train", "train.yaml", "optimizer.momentun=0.5", cwd=place)
    assert result.returncode == 2
    assert "optimizer.momentun: unknown key, did you mean 'momentum'?" in result.stderr
    assert not (place / "work/refused").exists()
