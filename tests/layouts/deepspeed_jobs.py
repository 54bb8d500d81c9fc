"""Under torchrun: `deepspeed_jobs.py JOB.json` runs the trainings of a job, one after the other.

A training is a config, and may have `nan_at` (a step whose loss is not finite on the last rank) and `prompt`
(token ids, whose continuation is printed by rank 0 as a line of JSON, as is what `evaluate` finds).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from collie_core import CollieConfig, Trainer
from collie_core.plugin import hookimpl
from collie_core.train.setup import open_training


class Poison:
    """A loss that is not finite in one step on the last rank."""

    def __init__(self, step: int) -> None:
        self.step, self.now = step, 0

    @hookimpl
    def collie_step_start(self, step: int) -> None:
        """Which step it is."""
        self.now = step

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy a token."""
        last = int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1
        factor = torch.nan if last and self.now == self.step else 1.0
        return factor * torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")


def run(training: dict[str, Any]) -> None:
    """One training of a job."""
    config = CollieConfig(**training["config"])
    first = os.environ.get("RANK", "0") == "0"
    poison = Poison(training["nan_at"]) if "nan_at" in training else None
    trainer = Trainer(
        config, callbacks=[poison] if poison else [], loss_fn=poison.loss if poison else None
    )
    trainer.train()
    if "prompt" in training:
        ids = torch.tensor([training["prompt"]])
        more = training["config"]["train"] | {"epochs": 99, "max_steps": 99}  # one that is done has no model
        with open_training(Trainer(CollieConfig(**training["config"] | {"train": more}))) as session:
            found = session.layout.generate(ids, max_new_tokens=8, eos_token_id=-1).tolist()
        if first:
            print(json.dumps(found), flush=True)
        figures = Trainer(config).evaluate()
        if first:
            print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for one in json.loads(Path(sys.argv[1]).read_text()):
        run(one)
