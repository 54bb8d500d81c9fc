"""Prompt tuning, p-tuning and prefix tuning: training, files that peft reads, generation, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from adapter_runs import IDS, lora_config, own_logits, peft_logits
from training_helpers import losses

from collie_core import Trainer

KINDS: dict[str, dict[str, Any]] = {
    "prompt_tuning": {"name": "prompt_tuning"},
    "prompt_text": {
        "name": "prompt_tuning",
        "prompt_tuning_init": "text",
        "prompt_tuning_init_text": "What does the function return?",
    },
    "p_tuning": {"name": "p_tuning", "encoder_hidden_size": 24},
    "prefix_tuning": {"name": "prefix_tuning"},
}


def run(kind: str, model: Path, data: Path, out: Path, **changes: Any) -> Any:
    section = {"num_virtual_tokens": 5, **KINDS[kind]}
    return Trainer(lora_config(model, data, out, section, **changes)).train()


@pytest.mark.parametrize("kind", KINDS)
def test_peft_gives_the_logits_of_the_trained_adapter(
    kind: str, tiny_llama: Path, data_file: Path, tmp_path: Path
) -> None:
    result = run(kind, tiny_llama, data_file, tmp_path / "run")
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    ours = own_logits(result.model)
    assert ours.shape == (1, IDS.shape[1], 320)
    assert float((ours - own_logits(tiny_llama)).abs().max()) > 1e-3
    theirs = peft_logits(tiny_llama, result.model)[:, -IDS.shape[1] :]
    assert float((ours - theirs).abs().max()) < 2e-5
