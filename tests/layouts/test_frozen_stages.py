"""Pipelines of which the first stages train nothing: no gradient is sent to where none is needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from layout_jobs import Training, base_config, run_job
from training_helpers import largest_difference, losses, weights

CHOICES: dict[str, dict[str, Any]] = {
    "head alone": {"trainable": ["head.*"]},
    "last blocks and head": {"frozen": ["embed.*", "blocks.0.*", "blocks.1.*"]},
    "first blocks": {"trainable": ["blocks.0.*", "blocks.1.*"]},
    "a block in the middle": {"trainable": ["blocks.1.*"]},
}


def trainings(folder: Path, layout: str, model: Path, data: Path) -> dict[str, Training]:
    lomo = {"name": "lomo", "lr": 0.1, "clip_grad_norm": 0.5}
    return {
        name: Training(
            base_config(
                model, data, folder / name, layout, optimizer=lomo, train={"max_steps": 2, **patterns}
            )
        )
        for name, patterns in CHOICES.items()
    }


@pytest.fixture(scope="module")
def alone(
    tmp_path_factory: pytest.TempPathFactory, make_llama: Callable[..., Path], data: Path
) -> dict[str, Training]:
    folder = tmp_path_factory.mktemp("alone")
    found = trainings(folder, "single", make_llama(), data)
    run_job(folder, "single", list(found.values()))
    return found


@pytest.mark.parametrize("layout", ["pp2", "pp2_interleaved"])
def test_frozen_stages_give_what_one_process_gives(
    layout: str, alone: dict[str, Training], make_llama: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    found = trainings(tmp_path, layout, make_llama(), data)
    run_job(tmp_path, layout, list(found.values()))
    for name, training in found.items():
        assert losses(training.out) == pytest.approx(losses(alone[name].out), rel=2e-6), name
        assert largest_difference(weights(alone[name].out), weights(training.out)) < 1e-6, name
