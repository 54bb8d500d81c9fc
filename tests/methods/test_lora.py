"""collie-lora: training, files that peft reads, merging, resuming, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from adapter_runs import lora_config, own_logits, peft_logits
from training_helpers import losses

from collie_core import AutoModelForCausalLM, Trainer

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
    assert result.model == out / "adapter" and not (out / "model").exists()
    assert losses(out)[-1] < losses(out)[0]
    ours = own_logits(result.model)
    assert float((ours - own_logits(tiny_llama)).abs().max()) > 1e-2
    assert float((ours - peft_logits(tiny_llama, result.model)).abs().max()) < 2e-5
    model = AutoModelForCausalLM.from_pretrained(result.model)
    model.merge_adapters()
    model.save_pretrained(tmp_path / "merged")
    assert float((ours - own_logits(tmp_path / "merged")).abs().max()) < 2e-5
