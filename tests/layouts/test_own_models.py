"""A module with weights that the user gives: all ranks train the first rank's values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from layout_jobs import Training, base_config, run_job, unequal_replicas
from training_helpers import largest_difference, losses, weights


@pytest.mark.parametrize("tied", [False, True])
def test_every_rank_trains_what_the_first_was_given(
    tied: bool, tmp_path: Path, make_llama: Callable[..., Path], data: Path
) -> None:
    found = {}
    for layout in ("single", "dp2_zero0", "dp2_zero3"):
        config = base_config(
            make_llama(tie_word_embeddings=tied),
            data,
            tmp_path / layout,
            layout,
            optimizer={"name": "lomo", "lr": 0.1},
            train={"max_steps": 2},
        )
        found[layout] = Training(config, ["call own_models"])
        run_job(tmp_path / f"job_{layout}", layout, [found[layout]])
    alone = found["single"].out
    for training in found.values():
        assert losses(training.out) == pytest.approx(losses(alone), rel=2e-6)
        assert largest_difference(weights(alone), weights(training.out)) < 1e-6
        assert not unequal_replicas(training.out.with_suffix(".replicas.json"))
