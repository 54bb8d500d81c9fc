"""The optimizers that test_parity leaves out, each with its default rate, under a few layouts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from layout_jobs import LAYOUTS, Training, base_config, run_job
from test_parity import METHODS
from training_helpers import largest_difference, losses, weights

from collie_core import CollieConfig
from collie_core.registry import Registry
from collie_core.train.setup import checked_plugins

UNDER = ("dp2_zero3", "tp2_sp", "pp2")
#: optimizers with options: in the hooks, after the backward pass, and clipped by two passes
VARIANTS: dict[str, dict[str, Any]] = {
    "hooks": {
        "optimizer": {"name": "adamw", "lr": 1e-4, "in_backward": True},
        "train": {"gradient_accumulation_steps": 1},
    },
    "kept": {"optimizer": {"name": "sgd", "lr": 1e-3, "momentum": 0.9, "in_backward": True}},
    "clipped": {
        "optimizer": {"name": "sophiag", "lr": 1e-4, "in_backward": True, "clip_grad_norm": 0.5},
        "train": {"gradient_accumulation_steps": 1},
    },
}
#: 8-bit states, which no CPU serves
CUDA_ALONE = {"adamw8bit"}
OTHERS = sorted({i.name for i in Registry().plugins() if i.kind == "optimizer"} - METHODS.keys() - CUDA_ALONE)


def accepted(name: str, layout: str) -> bool:
    """Whether the plugins' own checks let an optimizer train under a layout."""
    config = CollieConfig(model={"path": "model"}, optimizer={"name": name}, **LAYOUTS[layout][1])
    return not checked_plugins(config)[2]


def trainings(folder: Path, layout: str, model: Path, data: Path) -> dict[str, Training]:
    """A training with every other optimizer that is accepted, and with every variant."""
    sections: dict[str, dict[str, Any]] = {
        name: {"optimizer": {"name": name, "lr": 1e-4}} for name in OTHERS if accepted(name, layout)
    }
    return {
        name: Training(base_config(model, data, folder / name, layout, **section))
        for name, section in (sections | VARIANTS).items()
    }


@pytest.fixture(scope="module")
def alone(
    tmp_path_factory: pytest.TempPathFactory, make_llama: Callable[..., Path], data: Path
) -> dict[str, Training]:
    folder = tmp_path_factory.mktemp("alone")
    found = trainings(folder, "single", make_llama(), data)
    assert found.keys() == {*OTHERS, *VARIANTS}
    run_job(folder, "single", list(found.values()))
    return found


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_what_needs_whole_parameters_is_refused_where_they_are_cut(name: str) -> None:
    assert {layout for layout in UNDER if accepted(name, layout)} == {"pp2"}


def test_what_needs_whole_rows_is_refused_where_they_are_cut() -> None:
    assert {layout for layout in UNDER if accepted("adamw8bit", layout)} == {"dp2_zero3", "pp2"}


@pytest.mark.parametrize("layout", UNDER)
def test_an_optimizer_gives_what_it_gives_on_one_process(
    layout: str, alone: dict[str, Any], tmp_path: Path, make_llama: Callable[..., Path], data: Path
) -> None:
    found = trainings(tmp_path, layout, make_llama(), data)
    run_job(tmp_path, layout, list(found.values()))
    problems = []
    for name, training in found.items():
        if losses(training.out) != pytest.approx(losses(alone[name].out), rel=2e-6):
            problems.append(f"{name}: losses {losses(training.out)}, not {losses(alone[name].out)}")
        difference = largest_difference(weights(alone[name].out), weights(training.out))
        if difference > 1e-2 * 1e-4 * 5:
            problems.append(f"{name}: weights differ by {difference}")
    assert not problems, "\n".join(problems)
