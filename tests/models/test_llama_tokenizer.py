"""LLaMA's tokenizers beside the golden one: fuzzed against sentencepiece; old, extended and new folders."""

from __future__ import annotations

import io
import json
import logging
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import AutoTokenizer as StockTokenizer

from collie_core import AutoTokenizer
from collie_core.errors import CheckpointError
from collie_models.decoder.llama_tokenizer import load_tokenizer
from collie_models.decoder.spm_tokenizer import backend_tokenizer, read_sentencepiece

GOLDEN = Path(__file__).parents[1] / "golden" / "cases" / "tokenizer_llama"
TEXT = Path(__file__).read_text(encoding="utf-8").splitlines()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The golden tokenizer's folder, to be changed."""
    target = tmp_path / "tokenizer"
    target.mkdir()
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(GOLDEN / name, target / name)
    return target


def settings(folder: Path, **changes: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def train(tmp_path: Path, **options: Any) -> Path:
    """A sentencepiece model trained on this file."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        minloglevel=2,
        **options,
    )
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


SPECS: dict[str, dict[str, Any]] = {
    "llama": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "openllama": {"normalization_rule_name": "identity", "remove_extra_whitespaces": True},
    "nfkc": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": False},
    "no_prefix": {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "split_by_whitespace": False,
        "allow_whitespace_only_pieces": True,
    },
    "user_defined": {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "user_defined_symbols": ["<eoh>", "    "],
    },
}


@pytest.mark.parametrize("name", sorted(SPECS))
def test_ids_are_those_of_sentencepiece(name: str, tmp_path: Path) -> None:
    path = train(tmp_path, **SPECS[name])
    original = sentencepiece.SentencePieceProcessor(model_file=str(path))
    backend = backend_tokenizer(read_sentencepiece(path))
    draw = random.Random(0)
    pieces = [
        "  ",
        "    ",
        " ",
        "\n",
        "\t",
        "\r\n",
        "é",
        "你好",
        "😀",
        "\u3000",
        "ＡＢ",
        "▁",
        "==",
        "aa",
        "<eoh>",
    ]
    for _ in range(3000):
        text = "".join(draw.choice([*pieces, draw.choice(TEXT)[:9]]) for _ in range(draw.randint(0, 9)))
        assert backend.encode(text).ids == original.encode(text), repr(text)


def test_old_folders_load_with_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings(folder, tokenizer_class="LLaMATokenizer", bos_token="", eos_token="", unk_token="")
    with caplog.at_level(logging.WARNING):
        tokenizer = load_tokenizer(folder)
    assert "eos_token is empty" in caplog.text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert tokenizer("Hello")["input_ids"] == load_tokenizer(GOLDEN)("Hello")["input_ids"]
    (folder / "tokenizer_config.json").unlink()
    assert load_tokenizer(folder)("Hello")["input_ids"] == tokenizer("Hello")["input_ids"]


def test_special_tokens_as_fields(folder: Path) -> None:
    fields = {"__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": True}
    settings(
        folder, eos_token=fields, add_eos_token=True, pad_token={"content": "<unk>"}, padding_side="right"
    )
    tokenizer = load_tokenizer(folder)
    assert tokenizer("a")["input_ids"][-1] == 2 and tokenizer.pad_token_id == 0
    assert tokenizer("a", "b")["input_ids"].count(2) == 2
    assert tokenizer.padding_side == "right"


def test_added_tokens_keep_their_ids(folder: Path) -> None:
    (folder / "added_tokens.json").write_text(json.dumps({"<extra>": 641, "[PAD]": 640}))
    settings(folder, pad_token="[PAD]", additional_special_tokens=["<extra>"])
    tokenizer = load_tokenizer(folder)
    assert len(tokenizer) == 642 and tokenizer.pad_token_id == 640
    plain = load_tokenizer(GOLDEN)
    assert tokenizer("a<extra>b")["input_ids"] == [
        *plain("a")["input_ids"],
        641,
        *plain("b")["input_ids"][1:],
    ]
    assert "<extra>" in tokenizer.all_special_tokens
    (folder / "added_tokens.json").write_text(json.dumps({"<extra>": 700}))
    with pytest.raises(CheckpointError, match="'<extra>' has id 700"):
        load_tokenizer(folder)


def test_tokens_added_by_newer_files(folder: Path) -> None:
    token = {
        "content": "<|im_start|>",
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    settings(folder, added_tokens_decoder={"640": token})
    expected = load_tokenizer(folder)("<|im_start|>a")["input_ids"]
    assert 640 in expected
    settings(folder, added_tokens_decoder={})
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": 640, **token}]}))
    assert load_tokenizer(folder)("<|im_start|>a")["input_ids"] == expected


def test_without_legacy_only_the_beginning_gets_a_prefix(folder: Path) -> None:
    legacy = load_tokenizer(folder).tokenize("a</s>b")
    settings(folder, legacy=False)
    assert legacy == ["▁a", "</s>", "▁b"]
    assert load_tokenizer(folder).tokenize("a</s>b") == ["▁a", "</s>", "b"]


def test_chat_templates_are_kept(folder: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    settings(folder, chat_template=template)
    messages = [{"role": "user", "content": "hi"}]
    tokenizer = load_tokenizer(folder)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "[user]hi"
    (folder / "chat_template.jinja").write_text(template.replace("[", "<").replace("]", ">", 1))
    settings(folder, chat_template=[{"name": "default", "template": template}])
    (folder / "chat_template.jinja").unlink()
    assert load_tokenizer(folder).apply_chat_template(messages, tokenize=False) == "[user]hi"
    tokenizer.save_pretrained(str(tmp_path / "saved"))
    assert (
        StockTokenizer.from_pretrained(tmp_path / "saved").apply_chat_template(messages, tokenize=False)
        == "[user]hi"
    )


def test_tokenizer_json_alone(tiny_llama: Path, tmp_path: Path) -> None:
    expected = StockTokenizer.from_pretrained(tiny_llama)
    found = AutoTokenizer.from_pretrained(tiny_llama)
    assert found("What is it?")["input_ids"] == expected("What is it?")["input_ids"]
    assert found.is_fast and found.eos_token == "</s>"
    target = tmp_path / "llama3"
    shutil.copytree(tiny_llama, target)
    (target / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # tiktoken's file, as LLaMA 3 has
    assert (
        AutoTokenizer.from_pretrained(target)("What is it?")["input_ids"]
        == expected("What is it?")["input_ids"]
    )
