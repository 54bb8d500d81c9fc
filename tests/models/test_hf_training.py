"""Models of transformers through whole runs: packed training, evaluation, checkpoint, export, generation."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    MistralConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from collie_core import AutoModelForCausalLM as Ours
from collie_core import CollieConfig, Trainer
from collie_core.errors import CollieError
from collie_models.hf.parallel import tensor_parallel_problems

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(
        vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2
    ),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "mistral": MistralConfig(**SIZES, sliding_window=16),
    "gemma": GemmaConfig(**SIZES, head_dim=8),
    "phi": PhiConfig(**SIZES),
}


@pytest.fixture
def model_folder(request: pytest.FixtureRequest, tmp_path: Path, make_tokenizer: Callable[[], Any]) -> Path:
    """A random checkpoint of the family that the test names."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[request.param]).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def config(model: Path, data: Path, out: Path, /, **changes: Any) -> CollieConfig:
    sections: dict[str, Any] = {
        "model": {"path": str(model), "dtype": "float32", "provider": "hf"},
        "optimizer": {"name": "lomo", "lr": 0.05, "clip_grad_norm": 1.0},
        "data": {"train": str(data), "eval": str(data), "max_length": 128, "packing": True},
        "train": {"micro_batch_size": 2, "max_steps": 4},
        "evaluate": {"every_steps": 2},
        "monitors": [],
        "output_dir": str(out),
    }
    return CollieConfig(**{**sections, **changes})


@pytest.mark.parametrize("model_folder", sorted(CONFIGS), indirect=True)
def test_trains_evaluates_saves_reloads_and_generates(
    model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    Trainer(config(model_folder, data_file, out)).train()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    perplexities = [line["perplexity/perplexity"] for line in lines if "perplexity/perplexity" in line]
    assert len(perplexities) == 2 and perplexities[1] < perplexities[0]
    assert all(math.isfinite(line["loss"]) for line in lines if "loss" in line)
    before, after = (load_file(folder / "model.safetensors") for folder in (model_folder, out / "model"))
    assert before.keys() == after.keys()  # a tied head is written once, as it was
    assert any(not torch.equal(before[name], after[name]) for name in before)
    stock = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32).eval()
    model = Ours.from_pretrained(out / "model", provider="hf")
    row = torch.arange(5, 30).unsqueeze(0)
    torch.testing.assert_close(model(row).logits, stock(row).logits, atol=1e-5, rtol=1e-5)
    stock.generation_config.eos_token_id = None
    made = model.generate(row, max_new_tokens=5, eos_token_id=-1)
    assert torch.equal(
        made, stock.generate(input_ids=row, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    )


@pytest.mark.parametrize("model_folder", ["qwen3"], indirect=True)
def test_a_checkpoint_is_read_by_the_plugin_that_wrote_it(
    model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    """Without being told again; the family's own plugin has other names."""
    out = tmp_path / "out"
    Trainer(config(model_folder, data_file, out)).train()
    exported = load_file(out / "model" / "model.safetensors")
    shutil.rmtree(out / "model")
    model = Ours.from_pretrained(out / "checkpoints" / "step_000004")
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == exported.keys()
    assert all(torch.equal(again[name], exported[name]) for name in again)


@pytest.mark.parametrize("model_folder", ["gpt2"], indirect=True)
def test_a_resumed_run_ends_as_one_that_was_not_stopped(
    model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    """With dropout: GPT-2's config has 0.1 everywhere."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    Trainer(config(model_folder, data_file, whole)).train()
    for steps in (2, 4):
        train = {"micro_batch_size": 2, "max_steps": steps}
        Trainer(config(model_folder, data_file, parts, train=train, schedule={"name": "constant"})).train()
    again = tmp_path / "again"
    Trainer(config(model_folder, data_file, again, schedule={"name": "constant"})).train()
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (again, parts))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_tensor_parallelism_is_refused_where_it_would_not_be_right() -> None:
    [no_plan, dropout] = tensor_parallel_problems(CONFIGS["gpt2"], False)
    assert "transformers has no tensor-parallel plan for gpt2" in no_plan
    assert "attn_pdrop and resid_pdrop of 0" in dropout
    for whole in (False, "auto"):  # the plan says that auto is no
        assert tensor_parallel_problems(CONFIGS["qwen3"], whole) == []
    [sequences] = tensor_parallel_problems(CONFIGS["qwen3"], True)
    assert "set layout.sequence_parallel: false" in sequences


@pytest.mark.parametrize("model_folder", ["gpt2"], indirect=True)
def test_records_longer_than_the_learned_positions_are_refused(
    model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    data = {"train": str(data_file), "max_length": 257, "packing": True}
    with pytest.raises(CollieError, match="data.max_length: 257 is above the model's 256 positions"):
        Trainer(config(model_folder, data_file, tmp_path / "out", data=data)).train()
