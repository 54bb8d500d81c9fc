"""Every tokenizer against what its original gave: tokens, ids, pairs, padding, decoding, chats."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from transformers import AutoTokenizer as StockTokenizer

from collie_models.chatglm import tokenizer as chatglm
from collie_models.decoder import llama_tokenizer as llama
from collie_models.internlm import tokenizer as internlm
from collie_models.moss import tokenizer as moss

CASES = Path(__file__).parent / "cases"
LOADERS: dict[str, Callable[[Path], Any]] = {
    "chatglm": chatglm.load_tokenizer,
    "chatglm2": chatglm.load_tokenizer2,
    "internlm": internlm.load_tokenizer,
    "internlm2": internlm.load_tokenizer2,
    "llama": llama.load_tokenizer,
    "moss": moss.load_tokenizer,
}
Case = tuple[str, Any, dict[str, Any]]


def read_case(name: str) -> Case:
    """(family, tokenizer, golden values)."""
    folder = CASES / f"tokenizer_{name}"
    golden = json.loads((folder / "golden_tokenizer.json").read_text(encoding="utf-8"))
    return name, LOADERS[name](folder), golden


@pytest.fixture(params=sorted(LOADERS))
def case(request: pytest.FixtureRequest) -> Case:
    return read_case(request.param)


def check_texts(tokenizer: Any, golden: dict[str, Any]) -> None:
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


def test_every_text(case: Case) -> None:
    _, tokenizer, golden = case
    check_texts(tokenizer, golden)
    texts = [entry["text"] for entry in golden["encode"]]
    assert tokenizer(texts)["input_ids"] == [entry["ids"] for entry in golden["encode"]]
    assert tokenizer.batch_decode(tokenizer(texts)["input_ids"]) == [e["decoded"] for e in golden["encode"]]


def test_pairs_and_names(case: Case) -> None:
    family, tokenizer, golden = case
    for pair in golden["pairs"]:
        assert tokenizer(pair["a"], pair["b"])["input_ids"] == pair["ids"]
        if family != "llama":  # transformers' own class
            parts = [tokenizer(pair[side], add_special_tokens=False)["input_ids"] for side in "ab"]
            built = tokenizer.build_inputs_with_special_tokens(*parts)
            assert built == pair["build_inputs_with_special_tokens"]
    both = tokenizer([pair["a"] for pair in golden["pairs"]], [pair["b"] for pair in golden["pairs"]])
    assert both["input_ids"] == [pair["ids"] for pair in golden["pairs"]]
    names = golden["ids_to_tokens"]
    assert tokenizer.convert_ids_to_tokens(names["ids"]) == names["tokens"]
    assert (len(tokenizer), tokenizer.vocab_size) == (golden["len"], golden["vocab_size"])
    for name, (token, index) in golden["special"].items():
        if family == "moss" and name == "pad_token" or family == "llama" and name == "pad_token":
            continue  # set by whoever made the golden
        assert (getattr(tokenizer, name), getattr(tokenizer, f"{name}_id")) == (token, index), name
    for command, index in golden.get("commands", {}).items():
        assert tokenizer.get_command(command) == index
    assert tokenizer.padding_side == golden["padding_side"] or family == "moss"


def test_batches(case: Case) -> None:
    family, tokenizer, golden = case
    if golden.get("padding_without_pad_token"):
        with pytest.raises(ValueError, match="does not have a padding token"):
            tokenizer(["a", "b c"], padding=True)
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
        if family == "chatglm":
            tokenizer.full_attention_mask = True
        found = tokenizer(batch["texts"], **options)
        for key, value in batch[way].items():
            assert found[key] == value, (way, key)
        if family == "chatglm":
            tokenizer.full_attention_mask = False
            found = tokenizer(batch["texts"], **options)
        for row, mask in zip(found["input_ids"], found["attention_mask"], strict=True):
            assert len(row) == len(mask) and set(mask) <= {0, 1} and 1 in mask
        if options.get("padding"):
            tensors = tokenizer(batch["texts"], return_tensors="pt", **options)
            arrays = tokenizer(batch["texts"], return_tensors="np", **options)
            for key in found:
                assert tensors[key].tolist() == np.asarray(found[key]).tolist() == arrays[key].tolist(), key
            unpadded = tokenizer(batch["texts"], **{k: v for k, v in options.items() if "pad" not in k})
            padding = {key: value for key, value in options.items() if key != "truncation"}
            assert tokenizer.pad(unpadded, **padding)["input_ids"] == found["input_ids"]


@pytest.mark.parametrize("case", ["chatglm"], indirect=True)
def test_answers_beside_their_prompts(case: Case) -> None:
    """ChatGLM-6B's batches of prompts and answers, whose positions and masks tell the two apart."""
    _, tokenizer, golden = case
    tokenizer.full_attention_mask = True
    pairs = golden["pairs"]
    found = tokenizer([pair["a"] for pair in pairs], [pair["b"] for pair in pairs], padding=True)
    assert {key: found[key] for key in golden["pad_with_answer"]} == golden["pad_with_answer"]


@pytest.mark.parametrize("case", ["chatglm", "chatglm2", "internlm", "moss"], indirect=True)
def test_chats(case: Case) -> None:
    family, tokenizer, golden = case
    chat = golden["chat"]
    if family == "moss":
        messages = [("system", "META"), ("user", "你好"), ("assistant", "你好！"), ("user", "再见")]
        texts: list[Any] = [(messages, chat["prompt"], chat["ids"], {})]
    else:
        rounds = [turn for q, a in chat["history"] for turn in (("user", q), ("assistant", a))]
        query = ("user", chat.get("query", "再见"))
        alone = ("user", "你好" if family.startswith("chatglm") else "再见")
        prompt = {"add_generation_prompt": True}
        texts = [
            ([*rounds, query], chat["prompt"], chat["ids"], prompt),
            ([alone], chat["prompt_no_history"], chat["ids_no_history"], prompt),
        ]
    for turns, text, ids, options in texts:
        said = [{"role": role, "content": content} for role, content in turns]
        assert tokenizer.apply_chat_template(said, tokenize=False, **options) == text
        assert tokenizer.apply_chat_template(said, **options)["input_ids"] == ids
        assert tokenizer.apply_chat_template(said, return_dict=False, **options) == ids
        assert tokenizer(text)["input_ids"] == ids


def test_a_saved_copy_is_the_same_tokenizer(case: Case, tmp_path: Path) -> None:
    """Through the family's own loader, twice; with nothing left of the first folder."""
    family, _, golden = case
    source = tmp_path / "source"
    shutil.copytree(CASES / f"tokenizer_{family}", source)
    first = LOADERS[family](source)
    shutil.rmtree(source)
    for step in ("one", "two"):
        first.save_pretrained(str(tmp_path / step))
        again = LOADERS[family](tmp_path / step)
        check_texts(again, golden)
        assert again.chat_template == first.chat_template
        assert again.padding_side == first.padding_side
        assert again.all_special_tokens == first.all_special_tokens
        config = json.loads((tmp_path / step / "tokenizer_config.json").read_text(encoding="utf-8"))
        assert "auto_map" not in config
        first = again


@pytest.mark.parametrize("family", sorted(set(LOADERS) - {"chatglm"}))
def test_a_saved_copy_gives_the_same_ids_in_transformers(family: str, tmp_path: Path) -> None:
    """But for MOSS's runs of spaces that are longer than its longest token of spaces."""
    _, tokenizer, golden = read_case(family)
    tokenizer.save_pretrained(str(tmp_path))
    relatives = {"chatglm2": "glm", "moss": "codegen"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": relatives.get(family, "llama")}))
    stock = StockTokenizer.from_pretrained(tmp_path)
    for entry in golden["encode"]:
        if family == "moss" and " " * 32 in entry["text"]:
            continue
        assert stock(entry["text"])["input_ids"] == entry["ids"]
        assert stock(entry["text"], add_special_tokens=False)["input_ids"] == entry["ids_plain"]
    if family.startswith("internlm"):  # exported as a LLaMA
        relative = llama.load_tokenizer(tmp_path)
        for entry in golden["encode"]:
            assert relative(entry["text"])["input_ids"] == entry["ids"]
    assert stock.eos_token_id == tokenizer.eos_token_id
    chat = golden.get("chat", {})
    if "ids" in chat:
        assert stock(chat["prompt"])["input_ids"] == chat["ids"]


def test_offsets_point_at_the_characters_of_each_token(case: Case) -> None:
    family, tokenizer, golden = case
    for entry in golden["encode"]:
        found = tokenizer(entry["text"], add_special_tokens=False, return_offsets_mapping=True)
        assert found["input_ids"] == entry["ids_plain"]
        covered: set[int] = set()
        last = 0
        for start, end in found["offset_mapping"]:
            assert 0 <= start <= end <= len(entry["text"]) and end >= last
            covered |= set(range(start, end))
            last = end
        left = set(range(len(entry["text"]))) - covered
        # white space that the original drops stands for no token
        assert not "".join(entry["text"][index] for index in left).strip()
        assert not left or family in ("chatglm", "internlm", "moss")


def test_data_sets_map_in_worker_processes() -> None:
    """Each tokenizer travels to the workers, and its outputs into a table."""
    cases = {family: read_case(family) for family in LOADERS}
    texts = cases["moss"][2]["batch"]["texts"] * 2

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        found = {}
        for family, (_, tokenizer, _) in cases.items():
            for key, value in tokenizer(batch["text"]).items():
                found[f"{family}/{key}"] = value
        return found

    table = datasets.Dataset.from_dict({"text": texts}).map(encode, batched=True, num_proc=2)
    for family, (_, _, golden) in cases.items():
        ids = golden["batch"]["no_padding"]["input_ids"]
        assert golden["batch"]["texts"] == texts[:3]
        assert table[f"{family}/input_ids"][:] == ids * 2
        assert [len(mask) for mask in table[f"{family}/attention_mask"]] == [len(row) for row in ids * 2]
