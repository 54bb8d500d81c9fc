"""Adapters under layouts give what one process gives, and move from one layout to another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from layout_jobs import Training, base_config, run_job, unequal_replicas
from test_parity import same
from training_helpers import largest_difference, weights

ADAMW = {"name": "adamw", "lr": 1e-4}
VARIANTS: dict[str, dict[str, Any]] = {
    "dora_pissa": {
        "adapters": [{"name": "lora", "r": 3, "use_dora": True, "init_lora_weights": "pissa"}],
        "optimizer": ADAMW,
    },
    "prompt": {
        "adapters": [{"name": "prompt_tuning", "num_virtual_tokens": 5}],
        "optimizer": {"name": "lomo", "lr": 0.1, "clip_grad_norm": 0.5},
    },
    "p_tuning": {
        "adapters": [{"name": "p_tuning", "num_virtual_tokens": 5}],
        "optimizer": {"name": "sgd", "lr": 0.1},
    },
    "prefix_and_lora": {
        "adapters": [
            {"name": "prefix_tuning", "num_virtual_tokens": 3},
            {"name": "lora", "r": 2, "adapter_name": "low", "loraplus_lr_ratio": 4.0},
        ],
        "optimizer": ADAMW,
        "data": {"packing": True},
    },
}


METHODS = sorted({adapter["name"] for sections in VARIANTS.values() for adapter in sections["adapters"]})
UNDER = ["dp2_zero3", "tp2_sp", "dp2_tp2_pp2"]


def trainings(folder: Path, layout: str, model: Path, data: Path) -> dict[str, Training]:
    return {
        name: Training(base_config(model, data, folder / name, layout, **sections))
        for name, sections in VARIANTS.items()
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
        assert not list(same(alone[name].out, training.out, 5e-6)), name
        assert not unequal_replicas(training.out.with_suffix(".replicas.json")), name


def test_a_run_moves_to_another_layout(
    alone: dict[str, Training], tmp_path: Path, make_llama: Callable[..., Path], data: Path
) -> None:
    for layout, steps in (("tp2", 2), ("dp2_zero3", 5)):
        section = {**VARIANTS["dora_pissa"], "train": {"max_steps": steps}}
        config = base_config(make_llama(), data, tmp_path / "moved", layout, **section)
        run_job(tmp_path / layout, layout, [Training(config)])
    assert largest_difference(weights(alone["dora_pissa"].out), weights(tmp_path / "moved")) < 5e-6
