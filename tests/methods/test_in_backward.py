"""`in_backward: true` gives what the ordinary optimizer gives, and keeps no gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training_helpers import config, largest_difference, losses, metrics, weights

from collie_core import Trainer
from collie_core.cli.main import main
from collie_core.plugin import hookimpl

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "adam": {"lr": 1e-3, "weight_decay": 0.1},
    "adamw": {"lr": 1e-3, "amsgrad": True},
    "lion": {"lr": 1e-4, "weight_decay": 0.1},
    "adan": {"lr": 1e-3},
    "sophiag": {"lr": 1e-4, "hessian_every": 2},
}
#: those that know no other way
ALWAYS: dict[str, dict[str, Any]] = {"lomo": {"lr": 0.1}, "adalomo": {"lr": 0.01}}
DTYPES = ("float32", "bfloat16", "float16")


class LiveGradients:
    """The most gradients that were alive when any was computed, itself counted."""

    def __init__(self) -> None:
        self.most = 0

    @hookimpl
    def collie_model_loaded(self, model: torch.nn.Module) -> None:
        parameters = list(model.parameters())

        def count(gradient: torch.Tensor) -> None:
            self.most = max(self.most, 1 + sum(p.grad is not None for p in parameters))

        for parameter in parameters:
            parameter.register_hook(count)


def run(model: Path, data: Path, out: Path, name: str, /, callbacks: Any = (), **changes: Any) -> Path:
    section = {"name": name, **(OPTIMIZERS | ALWAYS)[name], **changes.pop("optimizer", {})}
    # on CUDA the gradients of embeddings are otherwise added up in any order
    train = {"max_steps": 4, "deterministic": True, **changes.pop("train", {})}
    Trainer(
        config(model, data, out, optimizer=section, train=train, **changes), callbacks=list(callbacks)
    ).train()
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_losses_and_parameters_are_equal(
    tiny_llama: Path, data_file: Path, tmp_path: Path, name: str, dtype: str
) -> None:
    model = {"dtype": dtype}
    ordinary = run(tiny_llama, data_file, tmp_path / "a", name, model=model)
    fused = run(tiny_llama, data_file, tmp_path / "b", name, model=model, optimizer={"in_backward": True})
    assert losses(fused) == losses(ordinary)
    assert largest_difference(weights(ordinary), weights(fused)) == 0.0


@pytest.mark.parametrize("clip_mode", ["two_pass", "keep"])
def test_clipping_and_accumulation_are_equal(
    tiny_llama: Path, data_file: Path, tmp_path: Path, clip_mode: str
) -> None:
    clip = {"clip_grad_norm": 0.3, "clip_grad_value": 0.02}
    for name, rows in (("sgd", 4), ("adamw", 2), ("lion", 4)):
        train = {"micro_batch_size": rows, "gradient_accumulation_steps": 4 // rows}
        folder = tmp_path / name
        ordinary = run(tiny_llama, data_file, folder / "a", name, optimizer=clip, train=train)
        options = {**clip, "in_backward": True, "clip_mode": clip_mode}
        fused = run(tiny_llama, data_file, folder / "b", name, optimizer=options, train=train)
        norms = [[line["grad_norm"] for line in metrics(out)] for out in (ordinary, fused)]
        assert norms[1] == pytest.approx(norms[0], rel=1e-5) and min(norms[0]) > 0.3
        assert losses(fused) == pytest.approx(losses(ordinary), rel=2e-6)
        assert largest_difference(weights(ordinary), weights(fused)) < 1e-6


@pytest.mark.parametrize("name", [*OPTIMIZERS, *ALWAYS])
def test_at_most_three_gradients_are_alive(
    tiny_llama: Path, data_file: Path, tmp_path: Path, name: str
) -> None:
    most: dict[str, int] = {}
    for method, options in ((name, {"in_backward": True} if name in OPTIMIZERS else {}), ("sgd", {})):
        counter, folder = LiveGradients(), tmp_path / str(len(most))
        train = {"max_steps": 1}
        run(tiny_llama, data_file, folder, method, callbacks=[counter], optimizer=options, train=train)
        most[folder.name] = counter.most
    assert 1 <= most["0"] <= 3 < 15 < most["1"]


@pytest.mark.parametrize("name", ["adamw", "lion", "sophiag"])
def test_a_run_of_bf16_states_resumes_bit_for_bit(
    tiny_llama: Path, data_file: Path, tmp_path: Path, name: str
) -> None:
    changes: dict[str, Any] = {
        "model": {"dtype": "bfloat16"},
        "optimizer": {"in_backward": True, "state_dtype": "bfloat16"},
        "checkpoint": {"every_steps": 2},
    }
    straight = run(tiny_llama, data_file, tmp_path / "a", name, **changes)
    run(tiny_llama, data_file, tmp_path / "b", name, train={"max_steps": 2}, **changes)
    resumed = run(tiny_llama, data_file, tmp_path / "b", name, **changes)
    assert losses(resumed) == losses(straight)
    assert largest_difference(weights(straight), weights(resumed)) == 0.0


def test_an_eight_bit_run_on_the_cpu_is_refused(
    tiny_llama: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    path = tmp_path / "train.yaml"
    mapping = config(tiny_llama, data_file, tmp_path / "out", optimizer={"name": "adamw8bit"}).to_mapping()
    path.write_text(yaml.safe_dump(mapping))
    assert main(["train", str(path)]) == 2
    message = capsys.readouterr().err
    assert "adamw8bit on cpu" in message and "state_dtype: bfloat16" in message
    assert not (tmp_path / "out").exists()


def test_momentum_without_a_dampened_first_step_is_refused(
    tiny_llama: Path, data_file: Path, tmp_path: Path
) -> None:
    from collie_core.errors import ConfigError

    with pytest.raises(ConfigError, match="optimizer.in_backward with optimizer.dampening"):
        options = {"dampening": 0.5, "nesterov": False, "in_backward": True}
        run(tiny_llama, data_file, tmp_path / "out", "sgd", optimizer=options)


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_a_clip_mode_that_nothing_would_heed_is_refused(
    tiny_llama: Path, data_file: Path, tmp_path: Path, name: str
) -> None:
    from collie_core.errors import ConfigError

    with pytest.raises(ConfigError, match="optimizer.clip_mode: is of updates in the backward pass"):
        run(tiny_llama, data_file, tmp_path / "out", name, optimizer={"clip_mode": "keep"})
