"""Compiled blocks: how many graphs a run of rows of many lengths needs, and that padding is unseen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from training_helpers import config, largest_difference, losses, weights

from collie_core import Trainer
from collie_core.data.collate import padded_length
from collie_core.plugin import Run, hookimpl


class Graphs:
    """A backend that computes a graph as it stands, and counts graphs; after each step, how many so far."""

    def __init__(self) -> None:
        self.made = 0
        self.after: list[int] = []

    def __call__(self, graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> Callable[..., Any]:
        self.made += 1
        return graph.forward

    @hookimpl
    def collie_step_end(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        self.after.append(self.made)


@pytest.mark.parametrize("packing", [False, True])
def test_a_run_of_many_lengths_compiles_twice(
    tiny_llama: Path, tmp_path: Path, packing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 200, (51,), generator=generator).tolist()
    records = [{"tokens": list(range(3, 3 + n)), "labels": list(range(3, 3 + n))} for n in lengths]
    graphs = Graphs()
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **how: compile_module(self, backend=graphs, **how)
    )
    runs = []
    for compiled in (False, True):
        torch._dynamo.reset()
        cfg = config(
            tiny_llama,
            tmp_path / "none.jsonl",
            tmp_path / f"{compiled}",
            optimizer={"name": "lomo", "lr": 0.05},
            data={"max_length": 256, "packing": packing},
            train={"micro_batch_size": 4, "epochs": 2, "compile": compiled},
        )
        Trainer(cfg, train_dataset=records, callbacks=[graphs] if compiled else []).train()
        runs.append(tmp_path / f"{compiled}")
    assert len(set(lengths)) > 30 and len(graphs.after) > 4
    assert graphs.made <= 2, graphs.after  # the first length and all others; the last batch is smaller, too
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-5)
    assert largest_difference(weights(runs[0]), weights(runs[1])) < 1e-5


def test_rows_come_in_few_lengths() -> None:
    padded = [padded_length(length, 2000) for length in range(1, 2001)]
    assert len(set(padded)) < 50 and padded[-1] == 2000
    assert all(length <= size <= max(length + 7, length * 9 / 8) for length, size in enumerate(padded, 1))
    assert all(size % 8 == 0 for size in padded)
