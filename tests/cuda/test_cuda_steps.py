"""Steps of a Trainer on a CUDA device: when they wait for it, and how often they compile."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from training_helpers import config, losses

from collie_core import Trainer
from collie_core.plugin import Run, hookimpl

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def records() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 200, (90,), generator=generator).tolist()
    return [{"tokens": list(range(3, 3 + n)), "labels": list(range(3, 3 + n))} for n in lengths]


def train(model: Path, out: Path, callback: object, **changes: Any) -> None:
    cfg = config(
        model,
        out / "none.jsonl",
        out,
        **{
            "model": {"dtype": "bfloat16"},
            "data": {"max_length": 256, "packing": changes.pop("packing")},
            **changes,
        },
    )
    Trainer(cfg, train_dataset=records(), callbacks=[callback]).train()


class Waits:
    """Counts in each step how often the host waited for the device, and where."""

    def __init__(self) -> None:
        self.places: list[list[str]] = []

    @hookimpl
    def collie_step_start(self, run: Run, step: int) -> None:
        self.caught = warnings.catch_warnings(record=True)
        self.seen = self.caught.__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")

    @hookimpl
    def collie_backward_end(self, run: Run, step: int) -> None:
        torch.cuda.set_sync_debug_mode("default")
        self.caught.__exit__(None, None, None)
        self.places.append(
            [f"{w.filename}:{w.lineno}" for w in self.seen if "synchronizing" in str(w.message)]
        )


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("mode", ["auto", "full", "selective", "offload"])
@pytest.mark.parametrize("optimizer", ["lomo", "adamw"])
def test_a_step_waits_only_for_its_figures(
    tiny_llama: Path, tmp_path: Path, optimizer: str, mode: str, packing: bool
) -> None:
    waits = Waits()
    train(
        tiny_llama,
        tmp_path,
        waits,
        packing=packing,
        optimizer={"name": optimizer, "lr": 1e-3},
        train={"micro_batch_size": 4, "compile": False, "activation_checkpointing": mode},
    )
    # the first step measures and allocates
    assert len(waits.places) > 3 and all(len(places) == 1 for places in waits.places[1:]), waits.places


class Graphs:
    """After each step, how many graphs were compiled so far."""

    def __init__(self) -> None:
        self.after: list[int] = []

    @hookimpl
    def collie_step_end(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        self.after.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("mode", ["none", "selective"])
def test_a_run_of_many_lengths_compiles_few_graphs(
    tiny_llama: Path, tmp_path: Path, mode: str, packing: bool
) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = Graphs()
    train(
        tiny_llama,
        tmp_path,
        graphs,
        packing=packing,
        optimizer={"name": "lomo", "lr": 1e-3},
        train={"micro_batch_size": 4, "epochs": 2, "compile": True, "activation_checkpointing": mode},
    )
    assert graphs.after[-1] <= 4, graphs.after  # sizes that change for the first time: length, records
    assert all(loss < 10 for loss in losses(tmp_path))
