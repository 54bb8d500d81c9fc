"""Quantised bases under layouts give what one process gives, or are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layout_jobs import Training, base_config, run_job, unequal_replicas
from training_helpers import largest_difference, losses, weights

ADAMW = {"name": "adamw", "lr": 1e-4}
LORA = {"name": "lora", "r": 3}
VARIANTS: dict[str, dict[str, Any]] = {
    # o_proj's 32 inputs would be cut within a block by two ranks
    "nf4": {"name": "nf4", "block_size": 32, "skip_modules": ["o_proj"]},
    "int8": {"name": "int8", "block_size": 32, "skip_modules": ["o_proj"]},
}
if torch.cuda.is_available():
    del VARIANTS["int8"]  # blocks of 32 are refused there
METHODS, UNDER = list(VARIANTS), ["dp2_zero3", "pp2", "tp2_sp"]


def trainings(folder: Path, layout: str, model: Path, data: Path) -> dict[str, Training]:
    return {
        name: Training(
            base_config(model, data, folder / name, layout, adapters=[section, LORA], optimizer=ADAMW)
        )
        for name, section in VARIANTS.items()
    }


@pytest.fixture(scope="module")
def alone(
    tmp_path_factory: pytest.TempPathFactory, make_llama: Callable[..., Path], data: Path
) -> dict[str, Training]:
    """The trainings on one process."""
    folder = tmp_path_factory.mktemp("single")
    found = trainings(folder, "single", make_llama(), data)
    run_job(folder, "single", list(found.values()))
    return found


@pytest.mark.parametrize("layout", UNDER)
def test_a_layout_gives_what_one_process_gives(
    layout: str, alone: dict[str, Training], tmp_path: Path, make_llama: Callable[..., Path], data: Path
) -> None:
    found = trainings(tmp_path, layout, make_llama(), data)
    run_job(tmp_path, layout, list(found.values()))
    for name, training in found.items():
        assert losses(training.out) == pytest.approx(losses(alone[name].out), abs=2e-6), name
        assert largest_difference(weights(alone[name].out), weights(training.out)) < 2e-6, name
        assert not unequal_replicas(training.out.with_suffix(".replicas.json")), name


def test_a_cut_within_a_block_is_refused(
    tmp_path: Path, make_llama: Callable[..., Path], data: Path
) -> None:
    sections = [{"name": "nf4", "block_size": 32}, LORA]
    config = base_config(make_llama(), data, tmp_path / "run", "tp2", adapters=sections, optimizer=ADAMW)
    with pytest.raises(AssertionError, match=r"tp_size 2 cuts the 32 inputs of blocks\.0\.attention\.o_proj"):
        run_job(tmp_path, "tp2", [Training(config)])
