"""`collie generate` with each family: its prompt, its chat format, and the tokens that end answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from family_checkpoints import golden_folder

from collie_core import AutoModelForCausalLM, AutoTokenizer
from collie_core.cli.main import main

FAMILIES = ["chatglm", "chatglm2", "internlm", "internlm2", "moss"]


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tiny model with its family's tokenizer."""
    return golden_folder(request.param, tmp_path / str(request.param))


def generate(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    """What the command prints as JSON."""
    arguments = ["generate", str(folder), "--prompt", "def f(x):", "--dtype", "float32", "--json"]
    assert main([*arguments, "--max-new-tokens", "8", *options]) == 0
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return printed


@pytest.mark.parametrize("chat", [False, True])
def test_the_prompt_is_the_familys(folder: Path, chat: bool, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    said = [{"role": "user", "content": "def f(x):"}]
    ids = tokenizer("def f(x):")["input_ids"]
    if chat:
        ids = tokenizer.apply_chat_template(said, add_generation_prompt=True)["input_ids"]
    ends = [tokenizer.eos_token_id, *tokenizer.stop_token_ids]
    expected = model.generate(torch.tensor([ids]), max_new_tokens=8, eos_token_id=ends if chat else None)
    new = expected[0, len(ids) :].tolist()
    printed = generate(folder, capsys, *(["--chat"] if chat else []))
    assert printed["answer"] == tokenizer.decode(new, skip_special_tokens=True)
    assert (printed["prompt_tokens"], printed["new_tokens"]) == (len(ids), len(new))


def test_an_answer_ends_at_the_chat_formats_token(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The first token that the model says is made the one that ends an answer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    said = [{"role": "user", "content": "def f(x):"}]
    ids = tokenizer.apply_chat_template(said, add_generation_prompt=True)["input_ids"]
    first = int(model.generate(torch.tensor([ids]), max_new_tokens=1, eos_token_id=-1)[0, -1])
    stop = [*tokenizer.stop_token_ids, tokenizer.eos_token_id][0]
    with torch.no_grad():
        for parameter in model.get_submodule("head.lm_head").parameters():
            parameter[[stop, first]] = parameter[[first, stop]]
    model.save_pretrained(tmp_path / "changed")
    for path in folder.iterdir():
        if not (tmp_path / "changed" / path.name).exists() and path.suffix not in (".bin", ".safetensors"):
            shutil.copy(path, tmp_path / "changed" / path.name)
    printed = generate(tmp_path / "changed", capsys, "--chat")
    assert (printed["new_tokens"], printed["answer"]) == (1, "")
