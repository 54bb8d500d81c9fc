"""float8 under layouts: scales come from whole weights, and from the rows of one micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from layout_jobs import Training, base_config, run_job, unequal_replicas
from training_helpers import losses

from collie_core import CollieConfig
from collie_core.errors import Refusal
from collie_core.train.setup import checked_plugins

METHODS: dict[str, dict[str, Any]] = {
    "lomo": {"optimizer": {"name": "lomo", "lr": 0.1, "clip_grad_norm": 0.5}},
    "adamw": {"optimizer": {"name": "adamw", "lr": 1e-3}},
    "lora": {"optimizer": {"name": "adamw", "lr": 1e-3}, "adapters": [{"name": "lora", "r": 4}]},
}
FLOAT8 = {"plugins": [{"name": "float8", "emulate": True}]}


@pytest.fixture(scope="module")
def under(
    tmp_path_factory: pytest.TempPathFactory, make_llama: Callable[..., Path], data: Path
) -> Callable[[str], dict[str, Training]]:
    """Runs every method under a layout, once."""
    done: dict[str, dict[str, Training]] = {}

    def run(layout: str) -> dict[str, Training]:
        if layout not in done:
            folder = tmp_path_factory.mktemp(layout)
            done[layout] = {
                name: Training(base_config(make_llama(), data, folder / name, layout, **method, **FLOAT8))
                for name, method in METHODS.items()
            }
            run_job(folder, layout, list(done[layout].values()))
        return done[layout]

    return run


@pytest.mark.parametrize(
    ("layout", "like"),
    [("pp2", "single"), ("dp2_zero1", "dp2_zero0"), ("dp2_zero3", "dp2_zero0"), ("dp2_offload", "dp2_zero0")],
)
def test_layouts_that_keep_micro_batches_whole_give_the_same(
    layout: str, like: str, under: Callable[[str], dict[str, Training]]
) -> None:
    for name, training in under(layout).items():
        other = under(like)[name]
        found, expected = losses(training.out), losses(other.out)
        assert found[0] == pytest.approx(expected[0], abs=1e-6), name
        # where sums have another order, a value may be rounded to its other neighbour in float8
        assert found == pytest.approx(expected, rel=5e-4), name
        assert not unequal_replicas(training.out.with_suffix(".replicas.json")), name


def test_ranks_that_share_a_micro_batch_come_near(under: Callable[[str], dict[str, Training]]) -> None:
    for name, training in under("dp2_zero0").items():
        assert losses(training.out) == pytest.approx(losses(under("single")[name].out), rel=5e-3), name


def test_tensor_parallelism_is_refused(make_llama: Callable[..., Path], data: Path, tmp_path: Path) -> None:
    config = base_config(make_llama(), data, tmp_path / "run", "tp2", **METHODS["lomo"], **FLOAT8)
    [problem] = checked_plugins(CollieConfig(**config))[2]
    assert isinstance(problem, Refusal) and problem.instead == {"tp_size": 1}
    assert "plugin float8 with tp_size" in problem
