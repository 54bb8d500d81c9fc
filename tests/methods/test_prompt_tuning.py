"""Prompt tuning, p-tuning and prefix tuning: training, files that peft reads, generation, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_runs import IDS, adapter_of, lora_config, own_logits, peft_logits, peft_model
from safetensors.torch import load_file
from training_helpers import config, losses

from collie_core import AutoModelForCausalLM, Trainer
from collie_core.errors import UserError
from collie_core.train.setup import check_run

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


def run(kind: str, model: Path, data: Path, out: Path, /, **changes: Any) -> Any:
    section = {"num_virtual_tokens": 5, **KINDS[kind]}
    return Trainer(lora_config(model, data, out, section, **changes)).train()


@pytest.mark.parametrize("kind", KINDS)
def test_peft_gives_the_logits_of_the_trained_adapter(
    kind: str, tiny_llama: Path, data_file: Path, tmp_path: Path
) -> None:
    result = run(kind, tiny_llama, data_file, tmp_path / "run")
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    ours = own_logits(adapter_of(result))
    assert ours.shape == (1, IDS.shape[1], 320)
    assert float((ours - own_logits(tiny_llama)).abs().max()) > 1e-3
    theirs = peft_logits(tiny_llama, adapter_of(result))[:, -IDS.shape[1] :]
    assert float((ours - theirs).abs().max()) < 2e-5


@pytest.mark.parametrize("kind", ["prompt_tuning", "prefix_tuning"])
def test_generation_goes_on_from_the_virtual_tokens(
    kind: str, tiny_llama: Path, data_file: Path, tmp_path: Path
) -> None:
    result = run(kind, tiny_llama, data_file, tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(adapter_of(result))
    found = model.generate(IDS, max_new_tokens=8, eos_token_id=-1)
    theirs, expected = peft_model(tiny_llama, adapter_of(result)), IDS
    with torch.no_grad():  # without a cache: with one peft 0.21.2 on transformers 5.24 goes on otherwise
        for _ in range(8):
            expected = torch.cat([expected, theirs(expected).logits[:, -1:].argmax(-1)], 1)
    assert found.tolist() == expected.tolist()
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), IDS], 1)
    both = torch.cat([padded, torch.full((1, 11), 9)])
    mask = torch.cat([(torch.arange(11) >= 3)[None], torch.ones(1, 11, dtype=torch.bool)])
    rows = model.generate(both, attention_mask=mask, max_new_tokens=8, eos_token_id=-1)
    assert rows[0, 3:].tolist() == found[0].tolist()


@pytest.mark.parametrize("kind", ["prompt_tuning", "prefix_tuning"])
def test_packed_records_have_virtual_tokens_each(
    kind: str, tiny_llama: Path, data_file: Path, tmp_path: Path
) -> None:
    for packing in (False, True):
        data = {"train": str(data_file), "eval": str(data_file), "max_length": 192, "packing": packing}
        train = {"micro_batch_size": 40, "max_steps": 1}
        run(kind, tiny_llama, data_file, tmp_path / str(packing), data=data, train=train)
    first = [losses(tmp_path / str(packing))[0] for packing in (False, True)]
    assert first[1] == pytest.approx(first[0], rel=1e-6)


@pytest.mark.parametrize("kind", ["prompt_tuning", "p_tuning", "prefix_tuning"])
def test_resuming_and_going_on_from_a_folder(
    kind: str, tiny_llama: Path, data_file: Path, tmp_path: Path
) -> None:
    data = {"train": str(data_file), "eval": str(data_file), "max_length": 64}
    whole = run(kind, tiny_llama, data_file, tmp_path / "whole", data=data)
    for steps in (2, 4):
        train = {"micro_batch_size": 4, "max_steps": steps}
        parts = run(kind, tiny_llama, data_file, tmp_path / "parts", data=data, train=train)
    expected, found = (load_file(adapter_of(r) / "adapter_model.safetensors") for r in (whole, parts))
    assert torch.equal(expected["prompt_embeddings"], found["prompt_embeddings"])
    again = Trainer(config(tmp_path / "parts", data_file, tmp_path / "none", data=data)).evaluate()
    assert again == pytest.approx(whole.evaluation, rel=1e-6)
    section = {"name": KINDS[kind]["name"], "path": str(adapter_of(whole))}
    still = {"optimizer": {"name": "sgd", "lr": 1e-30}, "data": data}
    more = Trainer(lora_config(tiny_llama, data_file, tmp_path / "more", section, **still)).train()
    found = load_file(adapter_of(more) / "adapter_model.safetensors")
    assert torch.equal(expected["prompt_embeddings"], found["prompt_embeddings"])


def test_virtual_tokens_cannot_be_merged(tiny_llama: Path, data_file: Path, tmp_path: Path) -> None:
    result = run("prompt_tuning", tiny_llama, data_file, tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(adapter_of(result))
    with pytest.raises(UserError, match="virtual tokens cannot be merged"):
        model.merge_adapters()
    model.save_pretrained(tmp_path / "copy")
    assert torch.equal(own_logits(tmp_path / "copy"), own_logits(adapter_of(result)))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ([{"name": "p_tuning"}, {"name": "prefix_tuning", "adapter_name": "b"}], "one adapter alone can put"),
        ([{"name": "prompt_tuning", "num_virtual_tokens": 64}], "leave no room for a record"),
        ([{"name": "prompt_tuning", "prompt_tuning_init": "text"}], "needs prompt_tuning_init_text"),
        ([{"name": "p_tuning", "path": "x", "encoder_hidden_size": 8}], "encoder_hidden_size: is 8, but of"),
    ],
)
def test_what_is_refused(
    sections: list[dict[str, Any]], message: str, tiny_llama: Path, data_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        Trainer(lora_config(tiny_llama, data_file, tmp_path / "run", *sections)).train()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["prompt_tuning", "p_tuning", "prefix_tuning"])
def test_a_number_beside_path_must_be_that_of_the_folder(
    name: str, tiny_llama: Path, data_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_text('{"num_virtual_tokens": 5}')
    section = {"name": name, "path": str(tmp_path), "num_virtual_tokens": 5}
    check_run(lora_config(tiny_llama, data_file, tmp_path / "run", section))
    section["num_virtual_tokens"] = 20  # the default, though written
    message = f"num_virtual_tokens: is 20, but {tmp_path} has 5; leave it out"
    with pytest.raises(UserError, match=message):
        check_run(lora_config(tiny_llama, data_file, tmp_path / "run", section))
