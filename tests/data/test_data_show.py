"""`collie data show`: what a run would train on, to read and for scripts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from collie_core.cli.data import pieces
from collie_core.cli.main import main

Show = Callable[..., str]


@pytest.fixture
def show(tiny_llama: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Show:
    """Standard output of `collie data show` with some arguments, on forty records of input and output."""
    config = tmp_path / "train.yaml"
    config.write_text(
        f"model: {{path: {tiny_llama}}}\ndata: {{train: {data_file}, max_length: 128}}\n"
        "train: {micro_batch_size: 4, gradient_accumulation_steps: 2}\n"
    )

    def run(*arguments: str, status: int = 0) -> str:
        assert main(["data", "show", str(config), *arguments]) == status
        printed = capsys.readouterr()
        return printed.err if status else printed.out

    return run


def test_records_are_marked(show: Show, records: list[dict[str, str]], data_file: Path) -> None:
    printed = show("-n", "2")
    for line, record in enumerate(records[:2], 1):
        assert f"{data_file}:{line}: " in printed
        assert f"<s>{record['input']}«{record['output']}</s>»" in printed.replace("« ", " «")
    assert f"{data_file}:3" not in printed


def test_counts(show: Show) -> None:
    figures = json.loads(show("--json", "-n", "0"))["counts"]
    assert figures["records"] == figures["rows"] == 40
    assert figures["steps_per_epoch"] == 5
    assert 0 < figures["trained_tokens"] < figures["tokens"]
    assert figures["trained_percent"] == round(100 * figures["trained_tokens"] / figures["tokens"], 1)
    packed = json.loads(show("data.packing=true", "--json", "-n", "0"))["counts"]
    assert packed["tokens"] == figures["tokens"]
    assert packed["fill_percent"] == round(100 * packed["tokens"] / (packed["rows"] * 128), 1) > 80
    table = show("-n", "0")
    assert "steps per epoch" in table and f"{figures['tokens']:,}" in table


def test_fewer_than_no_records_are_refused(show: Show, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        show("-n", "-1")
    assert caught.value.code == 2
    assert "argument -n: -1 is below 0" in capsys.readouterr().err


def test_json_records(show: Show, records: list[dict[str, str]], data_file: Path) -> None:
    shown = json.loads(show("--json", "-n", "3"))["records"]
    assert [record["origin"] for record in shown] == [f"{data_file}:{line}" for line in (1, 2, 3)]
    for record, given in zip(shown, records[:3], strict=True):
        text = "".join(piece["text"] for piece in record["pieces"])
        assert text == f"<s>{given['input']}{given['output']}</s>"
        assert [piece["trained"] for piece in record["pieces"]] == [False, True]
        trained = [
            token for token, label in zip(record["tokens"], record["labels"], strict=True) if label != -100
        ]
        assert trained == [label for label in record["labels"] if label != -100]


def test_the_evaluation_split_and_mistakes(show: Show, tmp_path: Path) -> None:
    assert "data.eval is not set" in show("--split", "eval", status=2)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "hello"}\n{"text": ""}\n')
    assert f'{bad}:2: "text" is empty' in show("--split", "eval", f"data.eval={bad}", status=2)
    figures = json.loads(show("--split", "eval", f"data.eval={bad}", "data.on_bad_record=skip", "--json"))[
        "counts"
    ]
    assert figures["skipped"] == {'"text" is empty': 1}
    assert "steps_per_epoch" not in figures
    printed = show("--split", "eval", f"data.eval={bad}", "data.on_bad_record=skip")
    assert 'skipped: "text" is empty' in printed


def test_pieces_write_special_tokens_and_keep_spaces(bpe: Any) -> None:
    ids = bpe("hello world 😀</s>")["input_ids"]
    trained = [False, False, True, True, True, True, True, True, True][: len(ids)]
    assert pieces(ids, trained, bpe) == [("<s>hello", False), (" world 😀</s>", True)]
    assert pieces([], [], bpe) == []
