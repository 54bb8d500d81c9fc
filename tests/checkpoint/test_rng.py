"""The state of the random generators survives JSON."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy
import pytest
import torch

from collie_core import CollieConfig
from collie_core.checkpoint.rng import restore_rng, restore_rng_of_rank, rng_state
from collie_core.errors import CheckpointError


def draw() -> list[float]:
    """Numbers from each generator; the normal ones leave a spare value in Python's and numpy's state."""
    numbers = [random.random(), random.gauss(0, 1), numpy.random.rand(), numpy.random.randn()]
    return numbers + torch.randn(3).tolist()


def test_every_generator_goes_on_where_it_was() -> None:
    draw()
    state = json.loads(json.dumps(rng_state()))
    expected = [draw(), draw()]
    random.seed(1)
    numpy.random.seed(1)
    torch.manual_seed(1)
    assert draw() != expected[0]
    restore_rng(state)
    assert [draw(), draw()] == expected


@pytest.mark.parametrize(
    "damage",
    [
        {"python": [3, [1, 2], None]},
        {"python": "x"},
        {
            "numpy": {
                "bit_generator": "MT19937",
                "state": {"key": [1], "pos": 0},
                "has_gauss": 0,
                "gauss": 0.0,
            }
        },
        {"numpy": {"bit_generator": "PCG64"}},
        {"numpy": 3},
        {"torch": "AAAA"},
        {"torch": "not base64!"},
        {"torch": 7},
    ],
)
def test_a_malformed_state_is_refused(damage: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="random generators is malformed"):
        restore_rng(rng_state() | damage)
    with pytest.raises(CheckpointError, match="random generators is malformed"):
        restore_rng({})


def test_a_rank_goes_on_only_where_every_rank_is_what_it_was() -> None:
    config = CollieConfig(model={"path": "model"}, dp_size=2)
    state = {"config": config.to_mapping(), "rng": [None, rng_state()]}
    expected = draw()
    assert not restore_rng_of_rank(state, CollieConfig(model={"path": "model"}, tp_size=2), 1)
    assert draw() != expected
    assert restore_rng_of_rank(state, config, 1)
    assert draw() == expected
    with pytest.raises(CheckpointError, match="random generators is malformed"):
        restore_rng_of_rank(state, config, 2)
