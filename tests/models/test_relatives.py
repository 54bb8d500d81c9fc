"""An exported relative, read by transformers from its folder alone: the same tokens in and out."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_checkpoints import golden_folder

from collie_core import AutoModelForCausalLM, AutoTokenizer
from collie_core.cli.main import main

RELATIVES = {"internlm": "llama", "internlm2": "llama", "moss": "codegen", "chatglm2": "glm"}
TEXTS = [
    "def f(x):\n    return x",
    "What is 3 + 4?",
    "你好，世界",
    "  two spaces",
    "a\tb  c",
    "café 😀",
    "x" * 30,
    "",
]


@pytest.mark.parametrize("family", sorted(RELATIVES))
def test_transformers_tokenises_and_generates_the_same(family: str, tmp_path: Path) -> None:
    source, out = golden_folder(family, tmp_path / "source"), tmp_path / "out"
    ours, model = AutoTokenizer.from_pretrained(source), AutoModelForCausalLM.from_pretrained(source)
    assert main(["export", str(source), str(out), "--as", RELATIVES[family]]) == 0
    names = ("eos_token_id", "bos_token_id", "pad_token_id", "padding_side", "chat_template")
    expected = {name: getattr(ours, name) for name in names}
    tokens = {text: ours(text, return_tensors="pt")["input_ids"] for text in TEXTS}
    new = {
        text: model.generate(ids, max_new_tokens=8, eos_token_id=-1)
        for text, ids in tokens.items()
        if ids.numel()
    }
    shutil.rmtree(source)

    theirs: Any = transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=False)
    stock: Any = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert {name: getattr(theirs, name) for name in names} == expected
    for text, ids in tokens.items():
        assert theirs(text)["input_ids"] == ids[0].tolist(), text
        back = theirs.decode(ids[0], skip_special_tokens=True)
        if family == "moss":  # its white-space tokens swallow the line breaks beside them
            back, text = "".join(back.split()), "".join(text.split())
        assert back.strip() == text.strip()
    again = AutoModelForCausalLM.from_pretrained(out)
    sample = tokens[TEXTS[0]]
    torch.testing.assert_close(again(sample).logits, model(sample).logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(stock(sample).logits, model(sample).logits, atol=1e-4, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(out)(TEXTS[0])["input_ids"] == sample[0].tolist()
    stock.generation_config.eos_token_id = None
    for text, ids in new.items():
        inputs = theirs(text, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        assert stock.generate(**inputs, do_sample=False, max_new_tokens=8).tolist() == ids.tolist(), text


@pytest.mark.parametrize("family", sorted(RELATIVES))
def test_printed_texts_differ_at_broken_characters_alone(family: str, tmp_path: Path) -> None:
    """transformers gives up the whole run of bytes around one that is of no character; and the originals put
    spaces beside special tokens, MOSS's beside its white-space tokens too."""
    source, out = golden_folder(family, tmp_path / "source"), tmp_path / "out"
    assert main(["export", str(source), str(out), "--as", RELATIVES[family]]) == 0
    ours = AutoTokenizer.from_pretrained(source)
    theirs: Any = transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=False)
    compared = 0
    for first in range(3, len(ours) - 3, 3):
        ids = [first, first + 1, first + 2]
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for tokenizer in (ours, theirs)]
        if any("\ufffd" in text for text in texts):
            continue
        compared += 1
        if family == "moss":
            texts = ["".join(text.split(" ")) for text in texts]
        assert texts[0] == texts[1], ours.convert_ids_to_tokens(ids)
    assert compared > 50
