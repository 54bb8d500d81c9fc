"""Compiled blocks give what others give, whatever cuts them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from layout_jobs import Training, base_config, run_job
from training_helpers import largest_difference, losses, weights

#: layout -> (blocks of the model, each of which is compiled by itself; what is recomputed)
UNDER = {
    "dp2_zero3": (1, ["none", "full", "selective"]),
    "tp2_sp": (1, ["none", "selective"]),
    "pp2": (2, ["full", "selective"]),
}


@pytest.mark.parametrize("layout", UNDER)
def test_compiled_blocks_give_the_same(
    layout: str, make_llama: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    blocks, modes = UNDER[layout]
    model = make_llama(num_hidden_layers=blocks)
    found = []
    for compiled, mode in ((False, "none"), *((True, mode) for mode in modes)):
        config = base_config(
            model,
            data,
            tmp_path / f"compiled_{compiled}_{mode}",
            layout,
            optimizer={"name": "lomo", "lr": 0.1, "clip_grad_norm": 0.5},
            data={"packing": True},
            train={"compile": compiled, "activation_checkpointing": mode, "max_steps": 2},
        )
        found.append(Training(config))
    run_job(tmp_path, layout, found)
    plain, *compiled_runs = (training.out for training in found)
    for run in compiled_runs:
        assert losses(run) == pytest.approx(losses(plain), rel=1e-5), run
        assert largest_difference(weights(plain), weights(run)) < 1e-5, run
