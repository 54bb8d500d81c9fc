"""Models of transformers on two processes: data, pipeline and tensor parallelism give the losses of one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layout_jobs import Training, run_trainings
from training_helpers import losses
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedConfig, Qwen3Config

CONFIGS: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(
        vocab_size=320,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        attn_pdrop=0,
        resid_pdrop=0,
        embd_pdrop=0,
    ),
    "qwen3": Qwen3Config(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        head_dim=8,
    ),
}
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2, dp 2, zero 3": ("gpt2", {"dp_size": 2, "layout": {"zero_stage": 3}}),
    "gpt2, pp 2": ("gpt2", {"pp_size": 2}),
    "qwen3, dp 2, zero 3": ("qwen3", {"dp_size": 2, "layout": {"zero_stage": 3}}),
    "qwen3, tp 2": ("qwen3", {"tp_size": 2}),
    "qwen3, pp 2": ("qwen3", {"pp_size": 2}),  # whose rotary tables are made anew on each stage
}


def training(folder: Path, name: str, data: Path, sizes: dict[str, Any]) -> Training:
    """Three steps of four rows each."""
    config = {
        "model": {"path": str(folder / "model"), "dtype": "float32", "provider": "hf"},
        "optimizer": {"name": "lomo", "lr": 0.05, "clip_grad_norm": 1.0},
        "data": {"train": str(data), "max_length": 128, "packing": True},
        "train": {"micro_batch_size": 4 // sizes.get("dp_size", 1), "max_steps": 3},
        "monitors": [],
        "output_dir": str(folder / name),
        **sizes,
    }
    return Training(config)


def test_two_processes_have_the_losses_of_one(
    tmp_path: Path, data_file: Path, make_tokenizer: Callable[[], Any]
) -> None:
    for family, config in CONFIGS.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / family / "model")
        make_tokenizer().save_pretrained(tmp_path / family / "model")
    alone = {family: training(tmp_path / family, "alone", data_file, {}) for family in CONFIGS}
    cases = {
        case: (family, training(tmp_path / family, case, data_file, sizes))
        for case, (family, sizes) in LAYOUTS.items()
    }
    run_trainings(tmp_path / "alone", 1, list(alone.values()))
    run_trainings(tmp_path / "two", 2, [run for _, run in cases.values()])
    for case, (family, run) in cases.items():
        expected = losses(alone[family].out)
        assert len(expected) == 3 and losses(run.out) == pytest.approx(expected, rel=2e-6), case
