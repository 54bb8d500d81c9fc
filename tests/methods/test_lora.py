"""collie-lora: training, files that peft reads, merging, resuming, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from training_helpers import config, losses, metrics

from collie_core import AutoModelForCausalLM, Trainer
from collie_core.errors import UserError
from collie_core.plugin import hookimpl

IDS = torch.tensor([[1, 5, 9, 33, 7, 12, 41, 8]])
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


def lora_config(model: Path, data: Path, out: Path, /, *adapters: dict[str, Any], **changes: Any) -> Any:
    """A run of LoRA by AdamW, at a rate that shows."""
    sections = [{"name": "lora", "r": 4, **adapter} for adapter in adapters or ({},)]
    base: dict[str, Any] = {
        "adapters": sections,
        "optimizer": {"name": "adamw", "lr": 1e-2},
        "train": {"micro_batch_size": 4, "max_steps": 4},
    }
    return config(model, data, out, **{**base, **changes})


def own_logits(path: Path, **how: Any) -> Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(path, **how)(IDS).logits


def peft_logits(base: Path, *adapters: Path) -> Tensor:
    """By stock peft on stock transformers."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM as Stock

    model = PeftModel.from_pretrained(Stock.from_pretrained(base, dtype=torch.float32), str(adapters[0]))
    for adapter in adapters[1:]:
        model.load_adapter(str(adapter), adapter_name=adapter.name)
    if len(adapters) > 1:
        model.base_model.set_adapter(["default", *(adapter.name for adapter in adapters[1:])])
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_gives_the_logits_of_the_trained_adapter(
    variant: str, tiny_llama: Path, data_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    result = Trainer(lora_config(tiny_llama, data_file, out, VARIANTS[variant])).train()
    assert result.model == out / "adapter" and not (out / "model").exists()
    assert losses(out)[-1] < losses(out)[0]
    ours = own_logits(result.model)
    assert float((ours - own_logits(tiny_llama)).abs().max()) > 1e-2
    assert float((ours - peft_logits(tiny_llama, result.model)).abs().max()) < 2e-5
    model = AutoModelForCausalLM.from_pretrained(result.model)
    model.merge_adapters()
    model.save_pretrained(tmp_path / "merged")
    assert float((ours - own_logits(tmp_path / "merged")).abs().max()) < 2e-5
