"""Runs for the training tests: a config over the tiny model, its metrics, and the weights it ended with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from collie_core import CollieConfig
from collie_core.plugin import Run, hookimpl


def config(model: Path, data: Path, out: Path, /, **changes: Any) -> CollieConfig:
    """A run of the tiny model in fp32, with no monitor; `changes` are sections merged over it."""
    base: dict[str, Any] = {
        "model": {"path": str(model), "dtype": "float32"},
        "optimizer": {"name": "sgd", "lr": 0.1},
        "schedule": {"name": "constant"},
        "data": {"train": str(data), "max_length": 64},
        "train": {"micro_batch_size": 4},
        "monitors": [],
        "output_dir": str(out),
    }
    for key, value in changes.items():
        merges = isinstance(value, dict) and isinstance(base.get(key), dict) and "name" not in value
        base[key] = {**base[key], **value} if merges else value
    return CollieConfig(**base)


class StopAt:
    """Ends the run after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    @hookimpl
    def collie_step_end(self, run: Run, step: int) -> None:
        if step == self.step:
            run.stop("the test asked for it")


def metrics(out: Path) -> list[dict[str, Any]]:
    """The training lines of metrics.jsonl."""
    return [line for line in all_lines(out) if "loss" in line]


def all_lines(out: Path) -> list[dict[str, Any]]:
    """Every line of metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    """Loss of every step."""
    return [line["loss"] for line in metrics(out)]


def weights(out: Path) -> dict[str, Tensor]:
    """The exported weights, of the model or the adapter."""
    found: dict[str, Tensor] = {}
    for path in sorted((out / "model").rglob("*.safetensors")):
        found |= load_file(path)
    return found


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest absolute difference of any element."""
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)
