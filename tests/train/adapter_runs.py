"""Runs of adapters for their tests, and logits of what they write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from training_helpers import config

from collie_core import AutoModelForCausalLM, CollieConfig
from collie_core.train.trainer import TrainResult

IDS = torch.tensor([[1, 5, 9, 33, 7, 12, 41, 8]])


def lora_config(
    model: Path, data: Path, out: Path, /, *adapters: dict[str, Any], **changes: Any
) -> CollieConfig:
    """A run of LoRA by AdamW, at a rate that shows."""
    sections = [
        adapter if "name" in adapter else {"name": "lora", "r": 4, **adapter} for adapter in adapters or ({},)
    ]
    base: dict[str, Any] = {
        "adapters": sections,
        "optimizer": {"name": "adamw", "lr": 1e-2},
        "train": {"micro_batch_size": 4, "max_steps": 4},
    }
    return config(model, data, out, **{**base, **changes})


def adapter_of(result: TrainResult) -> Path:
    """Where the adapter is."""
    assert result.model is not None
    return result.model


def own_logits(path: Path, **how: Any) -> Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(path, **how)(IDS).logits


def peft_model(base: Path, *adapters: Path) -> Any:
    """Stock transformers' model with stock peft's adapters."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM as Stock

    stock: Any = Stock.from_pretrained(base, dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(stock, str(adapters[0]))
    for adapter in adapters[1:]:
        model.load_adapter(str(adapter), adapter_name=adapter.name)
    if len(adapters) > 1:
        model.base_model.set_adapter(["default", *(adapter.name for adapter in adapters[1:])])
    return model.eval()


def peft_logits(base: Path, *adapters: Path) -> Tensor:
    """Its logits of IDS."""
    with torch.no_grad():
        logits: Tensor = peft_model(base, *adapters)(IDS).logits
    return logits
