"""Every tokenizer against what its original gave: tokens, ids, pairs, padding, truncation and decoding."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer as StockTokenizer

from collie_models.llama.tokenizer import load_tokenizer

CASES = Path(__file__).parent / "cases"
LOADERS: dict[str, Callable[[Path], Any]] = {"tokenizer_llama": load_tokenizer}


@pytest.fixture(params=sorted(LOADERS))
def case(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Any]]:
    """(tokenizer, golden values) of a case."""
    folder = CASES / request.param
    golden = json.loads((folder / "golden_tokenizer.json").read_text(encoding="utf-8"))
    return LOADERS[request.param](folder), golden


def test_every_text(case: tuple[Any, dict[str, Any]]) -> None:
    tokenizer, golden = case
    assert len(golden["encode"]) > 20
    for entry in golden["encode"]:
        ids = tokenizer(entry["text"])["input_ids"]
        plain = tokenizer(entry["text"], add_special_tokens=False)["input_ids"]
        found = {
            "text": entry["text"],
            "tokens": tokenizer.tokenize(entry["text"]),
            "ids": ids,
            "ids_plain": plain,
            "decoded": tokenizer.decode(ids),
            "decoded_skip_special": tokenizer.decode(ids, skip_special_tokens=True),
            "decoded_plain": tokenizer.decode(plain),
        }
        assert found == {key: entry[key] for key in found}


def test_pairs_and_names(case: tuple[Any, dict[str, Any]]) -> None:
    tokenizer, golden = case
    for pair in golden["pairs"]:
        assert tokenizer(pair["a"], pair["b"])["input_ids"] == pair["ids"]
    names = golden["ids_to_tokens"]
    assert tokenizer.convert_ids_to_tokens(names["ids"]) == names["tokens"]
    assert len(tokenizer) == golden["len"]


def test_batches(case: tuple[Any, dict[str, Any]]) -> None:
    tokenizer, golden = case
    tokenizer.pad_token = golden["special"]["pad_token"][0]
    tokenizer.padding_side = golden["padding_side"]
    batch = golden["batch"]
    ways: dict[str, dict[str, Any]] = {
        "no_padding": {},
        "longest": {"padding": True},
        "max_length_24": {"padding": "max_length", "max_length": 24, "truncation": True},
        "truncate_8": {"truncation": True, "max_length": 8},
        "multiple_of_8": {"padding": True, "pad_to_multiple_of": 8},
    }
    for way, options in ways.items():
        found = tokenizer(batch["texts"], **options)
        assert found["input_ids"] == batch[way]["input_ids"], way
        assert found["attention_mask"] == batch[way]["attention_mask"], way


def test_a_saved_copy_gives_the_same_ids_in_transformers(
    case: tuple[Any, dict[str, Any]], tmp_path: Path
) -> None:
    tokenizer, golden = case
    tokenizer.save_pretrained(str(tmp_path))
    stock = StockTokenizer.from_pretrained(tmp_path)
    for entry in golden["encode"]:
        assert stock(entry["text"])["input_ids"] == entry["ids"]


def test_offsets_point_at_the_characters_of_each_token(case: tuple[Any, dict[str, Any]]) -> None:
    tokenizer, golden = case
    for entry in golden["encode"]:
        found = tokenizer(entry["text"], add_special_tokens=False, return_offsets_mapping=True)
        covered = set()
        for start, end in found["offset_mapping"]:
            assert 0 <= start <= end <= len(entry["text"])
            covered |= set(range(start, end))
        assert covered == set(range(len(entry["text"])))
