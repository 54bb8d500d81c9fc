"""Models of transformers on two processes: data, pipeline and tensor parallelism give the losses of one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
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
    "qwen3, tp 2": ("qwen3", {"tp_size": 2}),
    "qwen3, pp 2": ("qwen3", {"pp_size": 2}),  # whose rotary tables are made anew on each stage
}


def losses(folder: Path, name: str, data: Path, sizes: dict[str, Any]) -> list[float]:
    """The losses of three steps of four rows each."""
    content = {
        "model": {"path": str(folder / "model"), "dtype": "float32", "provider": "hf"},
        "optimizer": {"name": "lomo", "lr": 0.05, "clip_grad_norm": 1.0},
        "data": {"train": str(data), "max_length": 128, "packing": True},
        "train": {"micro_batch_size": 4 // sizes.get("dp_size", 1), "max_steps": 3},
        "monitors": [],
        "output_dir": str(folder / name),
        **sizes,
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(content))  # JSON is YAML
    command = [sys.executable, "-m", "collie_core", "train", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("case", sorted(LAYOUTS))
def test_two_processes_have_the_losses_of_one(
    case: str, tmp_path: Path, data_file: Path, make_tokenizer: Callable[[], Any]
) -> None:
    family, sizes = LAYOUTS[case]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[family]).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    one, two = losses(tmp_path, "one", data_file, {}), losses(tmp_path, "two", data_file, sizes)
    assert len(one) == 3 and two == pytest.approx(one, rel=2e-6)
