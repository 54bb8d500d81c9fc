"""collie-lora: training, files that peft reads, merging, resuming."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_runs import IDS, adapter_of, lora_config, own_logits, peft_logits
from safetensors.torch import load_file, save_file
from torch import Tensor
from training_helpers import config, losses, metrics

from collie_core import AutoModelForCausalLM, Trainer
from collie_core.checkpoint.store import read_metadata
from collie_core.errors import UserError
from collie_core.plugin import Run, hookimpl

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 3},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_fast": {"init_lora_weights": "pissa_niter_4", "use_rslora": True},
    "dora_pissa": {"use_dora": True, "init_lora_weights": "pissa"},
    "attention": {"target_modules": "attention", "init_lora_weights": "gaussian"},
    "one_layer": {"target_modules": ["blocks.1.mlp.*"], "loraplus_lr_ratio": 16.0},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_gives_the_logits_of_the_trained_adapter(
    variant: str, tiny_llama: Path, data_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    result = Trainer(lora_config(tiny_llama, data_file, out, VARIANTS[variant])).train()
    assert result.model == out / "model" and not (out / "adapter").exists()
    assert losses(out)[-1] < losses(out)[0]
    ours = own_logits(adapter_of(result))
    assert float((ours - own_logits(tiny_llama)).abs().max()) > 1e-2
    assert float((ours - peft_logits(tiny_llama, adapter_of(result))).abs().max()) < 2e-5
    model = AutoModelForCausalLM.from_pretrained(adapter_of(result))
    model.merge_adapters()
    model.save_pretrained(tmp_path / "merged")
    assert float((ours - own_logits(tmp_path / "merged")).abs().max()) < 2e-5


def test_a_checkpoint_finds_a_relative_base_from_any_folder(
    tiny_llama: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where another model bears the same name."""
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    shutil.copytree(tiny_llama, tmp_path / "here" / "base")
    monkeypatch.chdir(tmp_path / "here")
    Trainer(lora_config(Path("base"), data_file, tmp_path / "run")).train()
    checkpoint = next((tmp_path / "run" / "checkpoints").glob("step_*"))
    expected = own_logits(checkpoint)
    shutil.copytree(tiny_llama, tmp_path / "there" / "base")
    weights = tmp_path / "there" / "base" / "model.safetensors"
    save_file({name: tensor * 0.5 for name, tensor in load_file(weights).items()}, weights)
    monkeypatch.chdir(tmp_path / "there")
    assert torch.equal(own_logits(checkpoint), expected)


def of(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter's folder."""
    return load_file(folder / "adapter_model.safetensors")


class Watcher:
    """What of the model is trained, and what moved."""

    def __init__(self) -> None:
        self.before: dict[str, Tensor] = {}
        self.moved: set[str] = set()

    @hookimpl
    def collie_model_loaded(self, run: Run) -> None:
        self.before = {name: shard.local.detach().clone() for name, shard in run.shards.items()}

    @hookimpl
    def collie_backward_end(self, run: Run) -> None:
        assert all(s.local.requires_grad == (".adapters." in name) for name, s in run.shards.items())
        assert all(s.local.grad is None for name, s in run.shards.items() if ".adapters." not in name)

    @hookimpl
    def collie_run_end(self, run: Run) -> None:
        self.moved = {n for n, s in run.shards.items() if not torch.equal(s.local.detach(), self.before[n])}


@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 0.1), ("lomo", 0.1), ("adalomo", 0.01)])
def test_the_adapter_alone_is_trained(
    optimizer: str, lr: float, tiny_llama: Path, data_file: Path, tmp_path: Path
) -> None:
    watcher, method = Watcher(), {"name": optimizer, "lr": lr}
    adapted = lora_config(tiny_llama, data_file, tmp_path / "lora", optimizer=method)
    Trainer(adapted, callbacks=[watcher]).train()
    assert watcher.moved and all(".adapters." in name for name in watcher.moved)
    Trainer(config(tiny_llama, data_file, tmp_path / "full", train={"max_steps": 1})).train()
    assert losses(tmp_path / "lora")[0] == losses(tmp_path / "full")[0]  # it begins as the model itself


def test_lora_plus_moves_b_faster(tiny_llama: Path, data_file: Path, tmp_path: Path) -> None:
    moved = {}
    for ratio in (1.0, 16.0):
        out = tmp_path / str(ratio)
        changes: dict[str, Any] = {"optimizer": {"name": "sgd", "lr": 0.01}, "train": {"max_steps": 1}}
        Trainer(lora_config(tiny_llama, data_file, out, {"loraplus_lr_ratio": ratio}, **changes)).train()
        moved[ratio] = of(out / "model")
    for name, once in moved[1.0].items():
        factor = 16.0 if "lora_B" in name else 1.0  # A has no gradient yet, B being 0
        torch.testing.assert_close(moved[16.0][name], once * factor)
        assert bool(once.any())


def test_the_default_rate_is_ten_times_the_optimizers(
    tiny_llama: Path, data_file: Path, tmp_path: Path
) -> None:
    for out, optimizer in ((tmp_path / "adamw", "adamw"), (tmp_path / "lomo", "lomo")):
        Trainer(lora_config(tiny_llama, data_file, out, optimizer=optimizer, train={"max_steps": 1})).train()
    rates = [metrics(tmp_path / name)[0]["lr"] for name in ("adamw", "lomo")]
    assert rates == pytest.approx([2e-4, 2e-1])


@pytest.mark.parametrize("variant", ["plain", "dora_pissa"])
def test_resuming_gives_the_same_bits_from_a_checkpoint_of_the_adapter_alone(
    variant: str, tiny_llama: Path, data_file: Path, tmp_path: Path
) -> None:
    section = VARIANTS[variant]
    whole = Trainer(lora_config(tiny_llama, data_file, tmp_path / "whole", section)).train()
    for steps in (2, 4):
        train = {"micro_batch_size": 4, "max_steps": steps}
        parts = Trainer(lora_config(tiny_llama, data_file, tmp_path / "parts", section, train=train)).train()
    expected, found = of(adapter_of(whole)), of(adapter_of(parts))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    checkpoint = tmp_path / "parts" / "checkpoints" / "step_000004"
    stored = read_metadata(checkpoint).tensors
    assert all(".adapters." in name for name in stored if not name.startswith("layout."))
    # the checkpoint is a model like any: the base model is found by the run's config
    assert float((own_logits(checkpoint) - own_logits(adapter_of(parts))).abs().max()) < 2e-5


def test_several_adapters(tiny_llama: Path, data_file: Path, tmp_path: Path) -> None:
    sections: list[dict[str, Any]] = [
        {"target_modules": "attention", "adapter_name": "first"},
        {"target_modules": ["q_proj", "mlp"], "adapter_name": "second", "r": 2},
    ]
    result = Trainer(lora_config(tiny_llama, data_file, tmp_path / "run", *sections)).train()
    folders = [adapter_of(result) / "first", adapter_of(result) / "second"]
    assert all((folder / "adapter_config.json").is_file() for folder in folders)
    ours = own_logits(tmp_path / "run")
    assert torch.equal(ours, own_logits(adapter_of(result)))
    assert float((ours - peft_logits(tiny_llama, *folders)).abs().max()) < 2e-5


def test_training_goes_on_from_a_folder(tiny_llama: Path, data_file: Path, tmp_path: Path) -> None:
    first = Trainer(lora_config(tiny_llama, data_file, tmp_path / "a", {"use_rslora": True})).train()
    section = {"name": "lora", "path": str(adapter_of(first))}
    still = {"optimizer": {"name": "sgd", "lr": 1e-30}}
    again = Trainer(lora_config(tiny_llama, data_file, tmp_path / "b", section, **still)).train()
    expected, found = of(adapter_of(first)), of(adapter_of(again))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert torch.equal(own_logits(adapter_of(first)), own_logits(adapter_of(again)))


def test_a_run_is_evaluated_with_its_adapter(tiny_llama: Path, data_file: Path, tmp_path: Path) -> None:
    data = {"train": str(data_file), "eval": str(data_file), "max_length": 64}
    trained = lora_config(tiny_llama, data_file, tmp_path / "run", data=data)
    result = Trainer(trained).train()
    for path in (tmp_path / "run", adapter_of(result), tmp_path / "run/checkpoints/step_000004"):
        figures = Trainer(config(path, data_file, tmp_path / "none", data=data)).evaluate()
        assert figures == result.evaluation, path
    base = Trainer(config(tiny_llama, data_file, tmp_path / "none", data=data)).evaluate()
    assert base != result.evaluation


def test_a_model_given_as_an_object(tiny_llama: Path, data_file: Path, tmp_path: Path) -> None:
    given = AutoModelForCausalLM.from_pretrained(tiny_llama)
    for out, model in ((tmp_path / "given", given), (tmp_path / "read", None)):
        Trainer(lora_config(tiny_llama, data_file, out), model=model).train()
    expected, found = of(tmp_path / "read" / "model"), of(tmp_path / "given" / "model")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


ADAPTERS: list[list[dict[str, Any]]] = [
    [{"name": "lora", "use_dora": True}],
    [{"name": "nf4", "block_size": 32}, {"name": "lora"}],
    [{"name": "p_tuning", "num_virtual_tokens": 5}],
    [{"name": "prefix_tuning", "num_virtual_tokens": 5}],
]


@pytest.mark.parametrize("adapters", ADAPTERS, ids=lambda adapters: adapters[0]["name"])
def test_an_object_has_the_adapters_that_it_was_trained_with(
    adapters: list[dict[str, Any]], tiny_llama: Path, data_file: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    data = {"train": str(data_file), "eval": str(data_file), "max_length": 64}
    plain = config(tiny_llama, data_file, tmp_path / "again", data=data)
    of_run = config(tiny_llama, data_file, tmp_path / "run", data=data, adapters=adapters)
    result = Trainer(of_run, model=model).train()
    model.save_pretrained(tmp_path / "saved")
    expected = own_logits(adapter_of(result))
    assert torch.equal(own_logits(tmp_path / "saved"), expected)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected)
    for known in (model, AutoModelForCausalLM.from_pretrained(tmp_path / "saved")):
        assert Trainer(plain, model=known).evaluate() == result.evaluation
    with pytest.raises(UserError, match="has adapters: name its base model here"):
        Trainer(plain, model=model).train()
    if adapters[-1]["name"] == "lora":
        model.merge_adapters()
        assert not [name for name, _ in model.named_parameters() if "lora" in name]
        with torch.no_grad():
            torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_bfloat16(tiny_llama: Path, data_file: Path, tmp_path: Path) -> None:
    low = {"model": {"path": str(tiny_llama), "dtype": "bfloat16"}}
    result = Trainer(lora_config(tiny_llama, data_file, tmp_path / "run", {"use_dora": True}, **low)).train()
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    assert {t.dtype for t in of(adapter_of(result)).values()} == {torch.bfloat16}
    theirs = peft_logits(tiny_llama, adapter_of(result))
    assert float((own_logits(adapter_of(result)) - theirs).abs().max()) < 2e-2
