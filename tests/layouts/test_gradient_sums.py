"""Gradients: which ranks have them, and what is not lost of them in 16 bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from layout_jobs import Training, base_config, run_job
from torch import Tensor, nn
from training_helpers import largest_difference, losses, weights

from collie_core import CollieConfig, Trainer
from collie_core.layouts.gradients import GradientFlow
from collie_core.train.setup import open_training


def test_gradients_used_together_are_judged_one_by_one() -> None:
    """One that is not finite leaves only its own parameter as it was; one that is missing holds none back."""
    names = ("embed.a", "blocks.0.a", "blocks.0.b", "blocks.0.unused", "blocks.1.a", "head.a")
    parameters = {name: nn.Parameter(torch.zeros(2, 3)) for name in names}
    updated: dict[str, tuple[bool, float]] = {}

    def update(name: str, parameter: nn.Parameter, gradient: Tensor, finite: Tensor) -> None:
        assert parameter is parameters[name]
        updated[name] = bool(finite), float(gradient[0, 0])

    flow = GradientFlow(parameters, together=True)
    flow.arm("update", torch.tensor(True), SimpleNamespace(update=update))
    factors = {name: float(number) for number, name in enumerate(names, 1) if name != "blocks.0.unused"}
    loss = torch.stack([factor * parameters[name].sum() for name, factor in factors.items()]).sum()
    (loss + torch.inf * parameters["blocks.0.b"][1, 2]).backward()
    flow.flush()
    assert updated == {name: (name != "blocks.0.b", factor) for name, factor in factors.items()}
    assert float(flow.norm()) == torch.inf
    assert all(parameter.grad is None for parameter in parameters.values())


def test_a_parameter_without_gradient_on_some_rank(tmp_path: Path) -> None:
    """It counts as zero there; what no rank uses has no gradient."""
    job = Training({"output_dir": str(tmp_path / "found")}, ["call missing_gradients"])
    run_job(tmp_path, "dp2_zero0", [job])
    sums = {"embed.a": 3.0, "blocks.0.a": 3.0, "blocks.0.b": 1.0, "blocks.2.a": 2.0, "head.a": 3.0}
    norm = sum(6 * value**2 for value in sums.values()) ** 0.5
    for rank in (0, 1):
        found = json.loads((tmp_path / f"found.{rank}.json").read_text())
        for mode in ("keep", "update"):
            assert found[mode]["gradients"] == {name: [value] * 6 for name, value in sums.items()}
            assert found[mode]["norm"] == pytest.approx(norm)


def test_offloaded_gradients_of_micro_batches_are_added_in_fp32(
    tmp_path: Path, make_llama: Callable[..., Path], data: Path
) -> None:
    """Which gives what it gives on the device, to the last bit."""
    found = {}
    for layout in ("dp2_zero3", "dp2_offload"):
        config = base_config(
            make_llama(),
            data,
            tmp_path / layout,
            layout,
            model={"dtype": "bfloat16"},
            optimizer={"name": "lomo", "lr": 0.1},
            train={"micro_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 3},
        )
        found[layout] = Training(config)
        run_job(tmp_path / f"job_{layout}", layout, [found[layout]])
    one, other = found.values()
    assert losses(one.out) == losses(other.out)
    assert largest_difference(weights(one.out), weights(other.out)) == 0.0


def test_kept_gradients_need_no_pass_for_their_norm(
    tmp_path: Path, make_llama: Callable[..., Path], data: Path
) -> None:
    train = {"gradient_accumulation_steps": 1, "max_steps": 2}
    lomo = {"name": "lomo", "lr": 0.1, "clip_grad_norm": 0.5, "clip_mode": "two_pass"}
    for layout, passes in (("dp2_offload", 1), ("dp2_zero3", 2)):
        config = base_config(make_llama(), data, tmp_path / layout, layout, optimizer=lomo, train=train)
        run_job(tmp_path / f"job_{layout}", layout, [Training(config, ["call count_losses"])])
        counts = [json.loads((tmp_path / f"{layout}.{rank}.json").read_text()) for rank in (0, 1)]
        assert counts == [2 * passes] * 2


class Recording:
    """An optimizer that changes nothing and keeps the gradients that it was given."""

    in_backward = False

    def __init__(self, parameters: dict[str, Any]) -> None:
        self.parameters = parameters
        self.gradients: dict[str, Tensor] = {}

    def passes(self, step: Any) -> list[str]:
        return ["update"]

    def step(self, lr: float) -> None:
        self.gradients = {name: p.grad.clone() for name, p in self.parameters.items() if p.grad is not None}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_is_unscaled_and_clipped_stays_in_fp32(
    dtype: str, tmp_path: Path, tiny_llama: Path, data_file: Path
) -> None:
    """Gradients below the least number of fp16 arrive, and are rounded once."""
    found: list[tuple[float, dict[str, Tensor]]] = []
    for section in ({}, {"clip_grad_norm": 1e-9}):
        config = CollieConfig(
            model={"path": str(tiny_llama), "dtype": dtype},
            optimizer={"name": "sgd", "lr": 0.1, **section},
            data={"train": str(data_file), "max_length": 64},
            train={"micro_batch_size": 4, "max_steps": 1, "compile": False},
            monitors=[],
            output_dir=str(tmp_path / f"run{len(found)}"),
        )

        def small(logits: Tensor, labels: Tensor) -> Tensor:
            losses = torch.nn.functional.cross_entropy(
                logits.float().transpose(1, 2), labels, ignore_index=-100, reduction="none"
            )
            return losses * 1e-6

        with open_training(Trainer(config, loss_fn=small)) as session:
            layout: Any = session.layout
            recording = layout.optimizer = Recording(layout.placed.trainable)
            figures = layout.train_step(next(iter(session.reader)), 0.1)
            found.append((figures["grad_norm"], recording.gradients))
    (norm, plain), (_, clipped) = found
    assert norm < 1e-5 and plain.keys() == clipped.keys()
    factor = 1e-9 / (norm + 1e-6)
    for name, gradient in plain.items():
        assert clipped[name].dtype == torch.float32
        assert gradient.abs().max() > 0, name
        assert torch.allclose(clipped[name], gradient.float() * factor, rtol=1e-5, atol=0)
