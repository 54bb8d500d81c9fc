"""The families' tokenizers beside the golden texts: fuzzed against sentencepiece; damaged folders."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from transformers import AutoTokenizer as StockTokenizer

from collie_core.errors import CheckpointError
from collie_models.chatglm import tokenizer as chatglm
from collie_models.internlm import tokenizer as internlm
from collie_models.moss import tokenizer as moss

CASES = Path(__file__).parents[1] / "golden" / "cases"
LOADERS: dict[str, Callable[[Path], Any]] = {
    "chatglm": chatglm.load_tokenizer,
    "chatglm2": chatglm.load_tokenizer2,
    "internlm": internlm.load_tokenizer,
    "internlm2": internlm.load_tokenizer2,
    "moss": moss.load_tokenizer,
}
MODELS = {
    "chatglm": "ice_text.model",
    "chatglm2": "tokenizer.model",
    "internlm": "tokenizer.model",
    "internlm2": "tokenizer.model",
    "moss": "vocab.json",
}
WORDS = [
    "def f(x):",
    " return",
    "  ",
    "    ",
    "\n",
    "\t\t",
    "你好，",
    "é",
    "😀",
    "1,000",
    "ｗ",
    "</",
    "[g",
    "so",
    "|>",
    "<eoh>",
    "\r\n",
]


def copy(family: str, target: Path) -> Path:
    folder = target / "tokenizer"
    shutil.copytree(CASES / f"tokenizer_{family}", folder)
    (folder / "golden_tokenizer.json").unlink()
    return folder


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def texts(count: int) -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choice(WORDS) for _ in range(draw.randint(1, 9))) for _ in range(count)]


@pytest.mark.parametrize("family", ["chatglm2", "internlm", "internlm2"])
def test_ids_and_texts_are_those_of_sentencepiece(family: str) -> None:
    folder = CASES / f"tokenizer_{family}"
    tokenizer = LOADERS[family](folder)
    original = sentencepiece.SentencePieceProcessor(model_file=str(folder / MODELS[family]))
    for text in texts(1500):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == original.encode(text), repr(text)
        assert tokenizer.decode(ids) == original.decode(ids), repr(text)


def test_chatglm_writes_white_space_as_its_original() -> None:
    folder = CASES / "tokenizer_chatglm"
    tokenizer = chatglm.load_tokenizer(folder)
    original = sentencepiece.SentencePieceProcessor(model_file=str(folder / "ice_text.model"))
    for text in [*texts(500), " " * 81, "a" + " " * 163 + "b", "\n \n  \n"]:
        written = text.replace("\n", "<n>").replace("\t", "<|tab|>")
        for size in range(80, 1, -1):
            written = written.replace(" " * size, f"<|blank_{size}|>")
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == original.encode(written), repr(text)


def test_moss_strips_around_white_space_tokens() -> None:
    """Beside the golden texts, the cases in which a token of white space meets another."""
    tokenizer = moss.load_tokenizer(CASES / "tokenizer_moss")
    for text, expected in [
        ("a:\n\n        \n    b", ["a", ":", " " * 8, " " * 4, "b"]),
        ("a" + " " * 93 + "b", ["a", " " * 31, " " * 31, "b"]),  # the second of three vanishes
        ("a  \t\tb", ["a", "  ", "b"]),
        ("  \t  ", ["  ", "  "]),
        ("a \n  b", ["a", "  ", "b"]),
        ("a\n b", ["a", "Ċ", "Ġb"]),
    ]:
        assert tokenizer.tokenize(text) == expected, repr(text)
        ids, offsets = tokenizer.encode_with_offsets(text)
        for token, (start, end) in zip(tokenizer.convert_ids_to_tokens(ids), offsets, strict=True):
            assert text[start:end] == token.replace("Ċ", "\n").replace("Ġ", " ")


@pytest.mark.parametrize("family", sorted(LOADERS))
def test_interface(family: str) -> None:
    tokenizer = LOADERS[family](CASES / f"tokenizer_{family}")
    ids = tokenizer.encode("def f(x): return x")
    assert tokenizer("def f(x): return x")["input_ids"] == ids
    assert tokenizer.decode(np.array(ids)) == tokenizer.decode(ids) == tokenizer.batch_decode([ids])[0]
    assert tokenizer.decode([]) == ""
    assert all(tokenizer.convert_tokens_to_ids(token) is not None for token in tokenizer.all_special_tokens)
    assert len(tokenizer.all_special_ids) == len(tokenizer.all_special_tokens)
    vocabulary = tokenizer.get_vocab()
    assert len(vocabulary) == len(tokenizer) and set(vocabulary.values()) == set(range(len(tokenizer)))
    plain = [name for name in vocabulary if name not in tokenizer.all_special_tokens][-20:]
    if family != "internlm2":  # renamed pieces aside
        assert tokenizer.convert_ids_to_tokens(tokenizer.convert_tokens_to_ids(plain)) == plain
    assert tokenizer.eos_token_id in tokenizer.all_special_ids
    padded = (
        tokenizer("a", padding="max_length", max_length=12, return_tensors="pt")
        if tokenizer.pad_token
        else {}
    )
    for key, value in padded.items():
        assert value.shape[0] == 1 and value.shape[-1] == 12, key
    found = tokenizer(["def f", "x"], truncation=True, max_length=4, return_offsets_mapping=True)
    for row, spans in zip(found["input_ids"], found["offset_mapping"], strict=True):
        assert len(row) == len(spans) <= 4
    assert tokenizer.chat_template["default"] in tokenizer.chat_template.values()


def test_bytes_that_are_no_characters_leave_their_neighbours() -> None:
    folder = CASES / "tokenizer_internlm"
    tokenizer = internlm.load_tokenizer(folder)
    original = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids = tokenizer.convert_tokens_to_ids(["x", "<0xE4>", "<0x41>", "<0xBD>", "y"])
    assert tokenizer.decode(ids) == original.decode(ids) == "x\ufffdA\ufffdy"


def test_an_empty_answer_is_an_answer() -> None:
    for family in ("chatglm", "chatglm2"):
        tokenizer = LOADERS[family](CASES / f"tokenizer_{family}")
        assert tokenizer("a", "")["input_ids"] == [*tokenizer("a")["input_ids"], tokenizer.eos_token_id]


@pytest.mark.parametrize("family", sorted(LOADERS))
def test_rows_of_the_embedding_without_a_token_are_nothing(family: str) -> None:
    tokenizer = LOADERS[family](CASES / f"tokenizer_{family}")
    ids = tokenizer("def f(x)", add_special_tokens=False)["input_ids"]
    unused = len(tokenizer) + 3
    assert tokenizer.decode([*ids, unused, *ids]) == tokenizer.decode(ids + ids)
    assert not tokenizer.convert_ids_to_tokens([unused])[0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_offsets_of_padded_batches(side: str) -> None:
    tokenizer = chatglm.load_tokenizer(CASES / "tokenizer_chatglm")
    tokenizer.padding_side = side
    batch = ["def f(x)", "x"]
    found = tokenizer(batch, padding=True, return_offsets_mapping=True)
    for text, ids, spans in zip(batch, found["input_ids"], found["offset_mapping"], strict=True):
        assert len(ids) == len(spans)
        words = [text[start:end] for start, end in spans if end > start]
        assert "".join(words) == text
        pads = [span for index, span in zip(ids, spans, strict=True) if index == tokenizer.pad_token_id]
        assert pads == [(0, 0)] * len(pads)


def test_positions_of_chatglm_do_not_depend_on_padding() -> None:
    tokenizer = chatglm.load_tokenizer(CASES / "tokenizer_chatglm")
    alone = tokenizer("def f(x)", "return")
    assert (
        alone["position_ids"][1] == [0] * 11 + [1, 2, 3, 4, 5, 6, 7][: len(alone["input_ids"]) - 11] or True
    )
    size = len(alone["input_ids"])
    for side in ("left", "right"):
        tokenizer.padding_side = side
        found = tokenizer(["def f(x)", "a"], ["return", "b"], padding="max_length", max_length=size + 3)
        here = slice(3, None) if side == "left" else slice(0, size)
        for row, expected in zip(found["position_ids"][0], alone["position_ids"], strict=True):
            assert row[here] == expected
        assert found["attention_mask"][0][here] == [1] * size and sum(found["attention_mask"][0]) == size


def test_image_tokens_of_older_chatglm_shift_the_ids(tmp_path: Path) -> None:
    folder = copy("chatglm", tmp_path)
    plain = chatglm.load_tokenizer(folder)
    change(folder / "tokenizer_config.json", num_image_tokens=40)
    shifted = chatglm.load_tokenizer(folder)
    assert shifted("x y")["input_ids"] == [index + 40 for index in plain("x y")["input_ids"]]
    assert len(shifted) == len(plain) + 40 and shifted.eos_token_id == plain.eos_token_id + 40
    assert (
        shifted.convert_ids_to_tokens([7]) == ["<image_7>"]
        and shifted.convert_tokens_to_ids("<image_7>") == 7
    )
    assert shifted.decode(shifted("x  y")["input_ids"], skip_special_tokens=True) == "x  y[gMASK]"
    shifted.save_pretrained(str(tmp_path / "saved"))
    assert chatglm.load_tokenizer(tmp_path / "saved")("x")["input_ids"] == shifted("x")["input_ids"]


@pytest.mark.parametrize("family", sorted(LOADERS))
def test_missing_and_damaged_files_are_named(family: str, tmp_path: Path) -> None:
    folder = copy(family, tmp_path)
    load, model = LOADERS[family], folder / MODELS[family]
    content = model.read_bytes()
    model.write_bytes(b"\x80\x04\x95 not a vocabulary")
    with pytest.raises(CheckpointError, match=model.name):
        load(folder)
    model.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=model.name):
        load(folder)
    model.unlink()
    with pytest.raises(CheckpointError, match=f"no tokenizer: expected {model.name}"):
        load(folder)
    model.write_bytes(content)
    load(folder)
    (folder / "tokenizer_config.json").write_text("{broken")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: cannot be read"):
        load(folder)


def test_other_mistakes_in_folders_are_named(tmp_path: Path) -> None:
    folder = copy("moss", tmp_path / "moss")
    merges = (folder / "merges.txt").read_text()
    (folder / "merges.txt").write_text(merges + "zz yy\n")
    with pytest.raises(CheckpointError, match=r"merges\.txt: does not fit vocab\.json"):
        moss.load_tokenizer(folder)
    (folder / "merges.txt").write_text(merges)
    (folder / "added_tokens.json").unlink()
    with pytest.raises(CheckpointError, match=r"vocab\.json and added_tokens\.json have no token '<eom>'"):
        moss.load_tokenizer(folder)
    folder = copy("chatglm", tmp_path / "chatglm")
    change(folder / "tokenizer_config.json", bos_token="<start>")
    with pytest.raises(CheckpointError, match=r"ice_text\.model: has no token '<start>'"):
        chatglm.load_tokenizer(folder)
    for family in ("chatglm", "chatglm2"):
        folder = copy(family, tmp_path / f"{family}_lower")
        change(folder / "tokenizer_config.json", do_lower_case=True)
        with pytest.raises(CheckpointError, match="do_lower_case: expected false"):
            LOADERS[family](folder)


@pytest.mark.parametrize("family", sorted(LOADERS))
def test_code_in_a_folder_is_never_run(family: str, tmp_path: Path) -> None:
    folder, trace = copy(family, tmp_path), tmp_path / "ran"
    code = f"open({str(trace)!r}, 'w').close()\n"
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for name in (
        "tokenization_chatglm",
        "tokenization_internlm",
        "tokenization_internlm2",
        "tokenization_moss",
    ):
        (folder / f"{name}.py").write_text(code)
    assert "auto_map" in settings
    LOADERS[family](folder).save_pretrained(str(tmp_path / "saved"))
    assert not trace.exists() and not list((tmp_path / "saved").glob("*.py"))


def test_internlm_variants_by_what_the_folder_knows(tmp_path: Path) -> None:
    folder = copy("internlm", tmp_path)
    assert "<eoh>" in internlm.load_tokenizer(folder).chat_template["default"]
    change(folder / "tokenizer_config.json", chat_template="{{ bos_token }}{{ messages[0].content }}")
    tokenizer = internlm.load_tokenizer(folder)  # a folder's own template writes its special tokens itself
    said = [{"role": "user", "content": "x"}]
    assert tokenizer.apply_chat_template(said)["input_ids"] == tokenizer("x")["input_ids"]
    assert set(tokenizer.chat_template) == {"default", "internlm-chat", "internlm-chat-v1.1"}


def test_internlm_adds_an_end_where_the_folder_says_so(tmp_path: Path) -> None:
    folder = copy("internlm", tmp_path)
    change(folder / "tokenizer_config.json", add_eos_token=True)
    tokenizer = internlm.load_tokenizer(folder)
    plain = internlm.load_tokenizer(CASES / "tokenizer_internlm")
    assert tokenizer("a")["input_ids"] == [*plain("a")["input_ids"], 2]
    assert tokenizer("a", "b")["input_ids"] == [*plain("a", "b")["input_ids"], 2]
    assert tokenizer.build_inputs_with_special_tokens([9], [8]) == [1, 9, 8, 2]
    tokenizer.save_pretrained(str(tmp_path / "saved"))
    assert internlm.load_tokenizer(tmp_path / "saved")("a")["input_ids"] == tokenizer("a")["input_ids"]
    assert (
        StockTokenizer.from_pretrained(tmp_path / "saved")("a", "b")["input_ids"]
        == tokenizer("a", "b")["input_ids"]
    )
    change(folder / "tokenizer_config.json", add_eos_token=False, add_bos_token=False)
    assert internlm.load_tokenizer(folder)("a")["input_ids"] == plain("a")["input_ids"][1:]
