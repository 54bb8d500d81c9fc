"""Compiled blocks give what others give, whatever cuts them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from layout_jobs import Training, base_config, run_job
from training_helpers import largest_difference, losses, weights

#: (layout, recomputation, blocks of the model, each of which is compiled by itself)
UNDER = [
    ("dp2_zero3", "selective", 1),
    ("tp2_sp", "none", 1),
    ("tp2_sp", "selective", 1),
    ("pp2", "full", 2),
    ("pp2", "selective", 2),
]


@pytest.mark.parametrize(("layout", "recomputed", "blocks"), UNDER)
def test_compiled_blocks_give_the_same(
    layout: str,
    recomputed: str,
    blocks: int,
    make_llama: Callable[..., Path],
    data: Path,
    tmp_path: Path,
) -> None:
    model = make_llama(num_hidden_layers=blocks)
    found = []
    for compiled in (False, True):
        config = base_config(
            model,
            data,
            tmp_path / f"compiled_{compiled}",
            layout,
            optimizer={"name": "lomo", "lr": 0.1, "clip_grad_norm": 0.5},
            data={"packing": True},
            train={
                "compile": compiled,
                "max_steps": 2,
                "activation_checkpointing": recomputed if compiled else "none",
            },
        )
        found.append(Training(config))
    run_job(tmp_path, layout, found)
    plain, compiled_run = (training.out for training in found)
    assert losses(compiled_run) == pytest.approx(losses(plain), rel=1e-5)
    assert largest_difference(weights(plain), weights(compiled_run)) < 1e-5
