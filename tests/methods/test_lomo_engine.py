"""The LOMO family as plugins: options, passes of a step, state in checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training_helpers import config, largest_difference, losses, weights

from collie_core import Trainer
from collie_core.config.schema import CollieConfig
from collie_core.data.batch import MicroBatch, StepBatch
from collie_core.errors import CheckpointError
from collie_core.hookspecs import Optimizer
from collie_core.run import ParameterGroup, Run
from collie_methods.lomo import AdaLomoPlugin, LomoPlugin
from collie_methods.lomo.optimizer import AdaLomoOptimizer


@dataclass
class Place:
    """What the plugins ask of a layout."""

    needs_norm: bool


def step_batch(micro_batches: int) -> StepBatch:
    ids = torch.zeros(1, 4, dtype=torch.int64)
    micro = MicroBatch(ids, ids, None, None, (("data:1",),), 4)
    return StepBatch(7, 0, (micro,) * micro_batches, 3 * micro_batches, 4 * micro_batches)


def optimizer_of(plugin: Any, needs_norm: bool, tmp_path: Path, **section: Any) -> Any:
    config = CollieConfig(model={"path": "unused"}, optimizer={"name": "lomo", **section}, seed=5)
    run = Run(config, tmp_path, torch.device("cpu"))
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 2))
    return plugin.collie_optimizer(model=model, layout=Place(needs_norm), run=run)


@pytest.mark.parametrize("plugin", [LomoPlugin, AdaLomoPlugin])
@pytest.mark.parametrize(
    "clip_mode, needs_norm, micro_batches, passes",
    [
        ("auto", False, 1, ["update"]),
        ("auto", True, 1, ["norm", "update"]),
        ("auto", True, 2, ["update"]),  # the gradients of several micro-batches are kept anyway
        ("two_pass", True, 1, ["norm", "update"]),
        ("two_pass", True, 2, ["update"]),
        ("two_pass", False, 1, ["update"]),
        ("keep", True, 1, ["update"]),
    ],
)
def test_passes_of_a_step(
    tmp_path: Path, plugin: Any, clip_mode: Any, needs_norm: bool, micro_batches: int, passes: list[str]
) -> None:
    options = plugin.Options(clip_mode=clip_mode)
    optimizer = optimizer_of(plugin(options), needs_norm, tmp_path)
    assert isinstance(optimizer, Optimizer)
    assert plugin.in_backward and optimizer.in_backward
    assert optimizer.passes(step_batch(micro_batches)) == passes
    assert vars(optimizer)["step_number"] == 7


def test_settings_reach_the_optimizer(tmp_path: Path) -> None:
    section = {"clip_grad_value": 0.5, "weight_decay": 0.1, "lr": 0.2}
    optimizer = optimizer_of(LomoPlugin(LomoPlugin.Options()), False, tmp_path, **section)
    assert (optimizer.seed, optimizer.clip_grad_value) == (5, 0.5)
    decay = {name: group.weight_decay for name, group in optimizer.group_of.items()}
    assert decay == {"0.weight": 0.0, "1.weight": 0.1, "1.bias": 0.0}


def test_each_has_its_own_default_rate() -> None:
    assert (LomoPlugin.default_lr, AdaLomoPlugin.default_lr) == (2e-2, 5e-4)


@pytest.mark.parametrize(("clip", "lr"), [(None, 2e-2), (1.0, 1e-1)])
def test_clipped_steps_have_a_default_rate_of_their_own(
    clip: float | None, lr: float, tmp_path: Path, tiny_llama: Path, data_file: Path
) -> None:
    optimizer = {"name": "lomo", "clip_grad_norm": clip}
    train = {"max_steps": 1}
    Trainer(
        config(tiny_llama, data_file, tmp_path / "run", optimizer=optimizer, schedule="constant", train=train)
    ).train()
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["lr"] == lr


def test_importing_the_plugins_imports_no_torch() -> None:
    modules = "collie_methods.lomo, collie_core.optimizers.torch_optimizers"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def adalomo(seed: int) -> tuple[AdaLomoOptimizer, dict[str, nn.Parameter]]:
    torch.manual_seed(0)
    parameters = {
        "w": nn.Parameter(torch.randn(6, 5).bfloat16()),
        "b": nn.Parameter(torch.randn(5)),
    }
    return AdaLomoOptimizer([ParameterGroup(parameters, 1.0, 0.0)], seed=seed), parameters


def advance(optimizer: AdaLomoOptimizer, parameters: dict[str, nn.Parameter], steps: range) -> None:
    for step in steps:
        optimizer.passes(StepBatch(step, 0, (), 1, 1))
        optimizer.begin_pass("update", 0.01, 1.0, 1.0)
        generator = torch.Generator().manual_seed(step)
        for name, parameter in parameters.items():
            gradient = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            optimizer.update(name, parameter, gradient, torch.tensor(True))


def test_a_resumed_optimizer_goes_on_bit_for_bit() -> None:
    straight, expected = adalomo(1)
    advance(straight, expected, range(1, 11))
    first, weights = adalomo(1)
    advance(first, weights, range(1, 6))
    saved = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    second, resumed = adalomo(1)
    for name, parameter in resumed.items():
        parameter.data.copy_(weights[name].data)
    second.load_state_dict(saved)
    advance(second, resumed, range(6, 11))
    for name, parameter in resumed.items():
        assert torch.equal(parameter, expected[name])
    for name, tensor in straight.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor)


def test_state_that_does_not_fit_is_refused_and_nothing_changes() -> None:
    optimizer, parameters = adalomo(1)
    advance(optimizer, parameters, range(1, 3))
    before = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    wrong = {**before, "w.row": torch.zeros(7), "x.v": torch.zeros(2)}
    del wrong["b.t"]
    with pytest.raises(CheckpointError) as caught:
        optimizer.load_state_dict(wrong)
    message = str(caught.value)
    assert "w.row: has shape [7], expected [6]" in message
    assert "b.t: is missing" in message
    assert "x.v: belongs to no parameter" in message
    assert all(torch.equal(tensor, before[name]) for name, tensor in optimizer.state_dict().items())


@pytest.mark.parametrize("clip_mode", ["two_pass", "keep"])
def test_the_second_pass_draws_the_dropout_of_the_first(
    tmp_path: Path, data_file: Path, make_tokenizer: Callable[[], Any], clip_mode: str
) -> None:
    """With other masks in the second pass the gradients would not be those that the norm is of."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def trained(name: str, optimizer: dict[str, Any], dropout: float) -> Path:
        model, out = tmp_path / f"model_{dropout}", tmp_path / name
        torch.manual_seed(0)
        sizes: Any = {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
        rates: Any = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": 0.0}
        GPT2LMHeadModel(GPT2Config(**sizes, **rates, bos_token_id=1, eos_token_id=2)).save_pretrained(model)
        make_tokenizer().save_pretrained(model)
        section = {"lr": 0.3, "clip_grad_norm": 0.2, **optimizer}
        Trainer(config(model, data_file, out, optimizer=section, train={"max_steps": 4})).train()
        return out

    sgd = trained("sgd", {"name": "sgd"}, 0.5)
    lomo = trained("lomo", {"name": "lomo", "clip_mode": clip_mode}, 0.5)
    assert losses(lomo) == pytest.approx(losses(sgd), rel=2e-6)
    assert largest_difference(weights(sgd), weights(lomo)) < 1e-6
    assert losses(trained("without", {"name": "lomo"}, 0.0)) != pytest.approx(losses(lomo), rel=1e-3)
