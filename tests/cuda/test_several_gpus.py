"""Layouts on nccl: a run that is repeated gives the same bits, in-backward updates included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layout_jobs import LAYOUTS, Training, base_config, run_job, unequal_replicas
from training_helpers import largest_difference, losses, weights

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

#: updates that run while gradients of other parameters are reduced
METHODS: dict[str, dict[str, Any]] = {
    "lomo": {"optimizer": {"name": "lomo", "lr": 0.05}},
    "adalomo": {"optimizer": {"name": "adalomo", "lr": 1e-3, "clip_grad_norm": 0.5}},
    "adamw": {"optimizer": {"name": "adamw", "lr": 1e-3, "in_backward": True, "state_dtype": "bfloat16"}},
}


@pytest.mark.parametrize("layout", ["dp2_zero0", "dp2_zero3", "tp2_sp", "pp2", "dp2_tp2", "tp2_pp2"])
def test_a_repeated_run_is_bit_equal(
    layout: str, tmp_path: Path, make_llama: Callable[..., Path], data: Path
) -> None:
    if LAYOUTS[layout][0] > torch.cuda.device_count():
        pytest.skip(f"needs {LAYOUTS[layout][0]} CUDA devices")
    model = make_llama(hidden_size=512, intermediate_size=1024, num_hidden_layers=8)
    train = {"deterministic": True, "max_steps": 12, "gradient_accumulation_steps": 1, "compile": "auto"}
    found: dict[str, list[Training]] = {}
    for attempt in ("one", "other"):
        found[attempt] = [
            Training(
                base_config(
                    model,
                    data,
                    tmp_path / attempt / name,
                    layout,
                    model={"dtype": "bfloat16"},
                    train=train,
                    **sections,
                )
            )
            for name, sections in METHODS.items()
        ]
        run_job(tmp_path / f"job_{attempt}", layout, found[attempt], timeout=150)
    for one, other in zip(found["one"], found["other"], strict=True):
        assert losses(one.out) == losses(other.out)
        assert largest_difference(weights(one.out), weights(other.out)) == 0.0
        assert not unequal_replicas(other.out.with_suffix(".replicas.json"))
