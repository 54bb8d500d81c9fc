"""A run for monitors to watch, without training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from collie_core.config.schema import CollieConfig
from collie_core.run import Run

MakeRun = Callable[..., Run]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """`make_run(step=0, total_steps=40)`: a run that writes to tmp_path/demo."""

    def make(step: int = 0, total_steps: int = 40) -> Run:
        output_dir = tmp_path / "demo"
        output_dir.mkdir(exist_ok=True)
        config = CollieConfig(model={"path": "some/model"}, output_dir=output_dir, seed=7)
        return Run(config, output_dir, torch.device("cpu"), step=step, total_steps=total_steps)

    return make
