"""LoRA on every family: short names mean the same linears, and what is written is read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_runs import adapter_of, lora_config, own_logits, peft_logits
from family_checkpoints import golden_folder
from safetensors.torch import load_file

from collie_core import AutoTokenizer, Trainer
from collie_core.cli.main import main

#: family -> (linears of a block in attention, and in all; whether the stock model has the same ones)
FAMILIES = {
    "chatglm": (4, 6, False),
    "chatglm2": (4, 7, False),
    "internlm": (4, 7, True),
    "internlm2": (4, 7, False),
    "moss": (4, 6, False),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family(family: str, tmp_path: Path, token_data: Path) -> None:
    in_attention, in_all, stock = FAMILIES[family]
    model = golden_folder(family, tmp_path / "model")
    counts = []
    for targets in ("attention", "all-linear"):
        train = {"micro_batch_size": 4, "max_steps": 2}
        section = {"target_modules": targets}
        result = Trainer(lora_config(model, token_data, tmp_path / targets, section, train=train)).train()
        tensors = load_file(adapter_of(result) / "adapter_model.safetensors")
        assert all(name.startswith("base_model.model.") for name in tensors)
        assert any(".blocks.0." in name for name in tensors) != stock
        blocks = {part for name in tensors for part in name.split(".") if part.isdigit()}
        counts.append(len(tensors) // 2 // len(blocks))
    assert counts == [in_attention, in_all]
    ours = own_logits(adapter_of(result))
    assert float((ours - own_logits(model)).abs().max()) > 1e-3
    merge = ["export", str(tmp_path / "all-linear"), str(tmp_path / "merged"), "--merge"]
    assert main([*merge, "--dtype", "float32"]) == 0  # some are stored in float16
    assert float((ours - own_logits(tmp_path / "merged")).abs().max()) < 5e-5
    if stock:
        assert main(["export", str(model), str(tmp_path / "relative"), "--as", "llama"]) == 0
        assert float((ours - peft_logits(tmp_path / "relative", adapter_of(result))).abs().max()) < 5e-5


def test_any_model_of_transformers(tmp_path: Path, token_data: Path) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    stock = Gemma2ForCausalLM(Gemma2Config(vocab_size=320, num_attention_heads=4, head_dim=8, **sizes))
    stock.save_pretrained(tmp_path / "model")
    golden = golden_folder("internlm", tmp_path / "golden")
    train = {"micro_batch_size": 4, "max_steps": 2}
    config = lora_config(tmp_path / "model", token_data, tmp_path / "run", train=train)
    result = Trainer(config, tokenizer=AutoTokenizer.from_pretrained(golden)).train()
    ours = own_logits(adapter_of(result))
    assert float((ours - peft_logits(tmp_path / "model", adapter_of(result))).abs().max()) < 5e-5
