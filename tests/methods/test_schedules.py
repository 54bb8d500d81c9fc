"""Learning-rate schedules: against transformers where they coincide, and at their ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from collie_core.config.schema import ScheduleSection
from collie_core.schedules import learning_rate_factor


def factors(total: int, **section: Any) -> list[float]:
    schedule = ScheduleSection(**section)
    return [learning_rate_factor(schedule, step, total) for step in range(1, total + 1)]


def theirs(total: int, make: Callable[..., Any], **options: Any) -> list[float]:
    """The factor of a transformers schedule at its indices 0..total-1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    [factor] = make(optimizer, **options).lr_lambdas
    return [factor(index) for index in range(total)]


@pytest.mark.parametrize("warmup", [0, 7])
def test_equal_to_transformers_where_they_coincide(warmup: int) -> None:
    """Theirs counts from 0: in the warm-up our step s has their factor at s, after it that at s - 1."""
    total = 50
    cases: list[tuple[dict[str, Any], list[float]]] = [
        (
            {"name": "linear"},
            theirs(
                total,
                transformers.get_linear_schedule_with_warmup,
                num_warmup_steps=warmup,
                num_training_steps=total,
            ),
        ),
        (
            {"name": "cosine", "min_ratio": 0.1},
            theirs(
                total,
                transformers.get_cosine_with_min_lr_schedule_with_warmup,
                num_warmup_steps=warmup,
                num_training_steps=total,
                min_lr_rate=0.1,
            ),
        ),
        (
            {"name": "wsd", "decay_ratio": 0.2, "min_ratio": 0.1},
            theirs(
                total,
                transformers.get_wsd_schedule,
                num_warmup_steps=warmup,
                num_decay_steps=10,
                num_training_steps=total,
                min_lr_ratio=0.1,
                decay_type="linear",
            ),
        ),
        (
            {"name": "constant"},
            theirs(total, transformers.get_constant_schedule_with_warmup, num_warmup_steps=warmup),
        ),
    ]
    for section, expected in cases:
        found = factors(total, warmup_steps=warmup, **section)
        if section["name"] != "wsd":  # theirs warms up from the minimum, ours from 0
            assert found[: max(0, warmup - 1)] == pytest.approx(expected[1:warmup])
        assert found[warmup:] == pytest.approx(expected[warmup:]), section


def test_first_full_and_last_steps() -> None:
    found = factors(10, name="linear", warmup_steps=4)
    assert found[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert found[-1] == pytest.approx(1 / 6)
    assert factors(10, name="constant", warmup_steps=0) == [1.0] * 10
    assert factors(10, name="linear", min_ratio=0.5)[-1] == pytest.approx(0.5 + 0.5 * 0.1)
    assert factors(10, name="wsd", decay_ratio=0.3)[-4:] == pytest.approx([1.0, 1.0, 2 / 3, 1 / 3])


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "wsd"])
@pytest.mark.parametrize("total", [1, 2, 7])
@pytest.mark.parametrize("warmup", [{}, {"warmup_ratio": 0.03}, {"warmup_ratio": 1.0}, {"warmup_steps": 100}])
def test_every_step_of_every_schedule_trains(name: str, total: int, warmup: dict[str, Any]) -> None:
    assert all(0.0 < factor <= 1.0 for factor in factors(total, name=name, decay_ratio=0.5, **warmup))


def test_warmup_ratio_is_rounded_up() -> None:
    assert factors(50, name="constant", warmup_ratio=0.03)[:3] == [0.5, 1.0, 1.0]


def test_past_the_end_the_minimum_stays() -> None:
    for name in ("linear", "cosine", "wsd"):
        section = ScheduleSection(name=name, min_ratio=0.25)
        assert learning_rate_factor(section, 1000, 10) == pytest.approx(0.25)
