"""Files, folders, Parquet, Hugging Face data sets and token folders; and every way they can be broken."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from collie_core.config.schema import DataSection, SourceSection
from collie_core.data.build import build_dataset
from collie_core.data.dataset import TokenizedDataset
from collie_core.errors import DataError

Load = Callable[..., TokenizedDataset]

TEXTS = ["hello", "hello world", "how are you", "fine thanks", "Paris 😀"]
RECORDS = [{"text": text} for text in TEXTS]


@pytest.fixture
def load(bpe: Any) -> Load:
    """The data set at some paths (or sections), with keys of the data section."""

    def load(*paths: Any, split: Any = "train", **keys: Any) -> TokenizedDataset:
        sections = [path if isinstance(path, dict) else {"path": str(path)} for path in paths]
        section = DataSection.model_validate({split: sections, **keys})
        return build_dataset(getattr(section, split), bpe, section, split=split)

    return load


def texts(dataset: TokenizedDataset, bpe: Any) -> list[str]:
    bounds = zip(dataset.offsets[:-1], dataset.offsets[1:], strict=True)
    return [bpe.decode(dataset.tokens[start:end], skip_special_tokens=True) for start, end in bounds]


def origins(dataset: TokenizedDataset) -> list[str]:
    return [dataset.origin(record) for record in range(len(dataset))]


def test_json_lines(load: Load, bpe: Any, tmp_path: Path) -> None:
    """A byte-order mark, Windows line ends, blank lines and no line end at last."""
    lines = [json.dumps(record, ensure_ascii=False).encode() for record in RECORDS]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + lines[0] + b"\r\n\r\n" + lines[1] + b"\n  \n" + b"\n".join(lines[2:]))
    dataset = load(path)
    assert texts(dataset, bpe) == TEXTS
    assert origins(dataset) == [f"{path}:{line}" for line in (1, 3, 5, 6, 7)]


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"version": "1", "data": x}])
def test_json(load: Load, bpe: Any, tmp_path: Path, wrap: Callable[[Any], Any]) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(wrap(RECORDS)))
    dataset = load(path)
    assert texts(dataset, bpe) == TEXTS
    assert origins(dataset)[4] == f"{path}[4]"


def test_parquet_across_row_groups(load: Load, bpe: Any, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    many = [{"text": f"{TEXTS[n % 5]} {n}", "messages": None} for n in range(2500)]
    pq.write_table(pa.Table.from_pylist(many), path, row_group_size=1100)
    dataset = load(path)
    assert texts(dataset, bpe) == [record["text"] for record in many]
    assert dataset.origin(2400) == f"{path}[2400]"


def test_damaged_parquet(load: Load, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([{"text": f"{n}" * 50} for n in range(500)]), path)
    content = bytearray(path.read_bytes())
    content[4:200] = b"\xff" * 196
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a.parquet: row group 0 is damaged"):
        load(path)


def test_parquet_messages(load: Load, bpe: Any, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Paris"}]
    pq.write_table(pa.Table.from_pylist([{"messages": messages}]), tmp_path / "a.parquet")
    dataset = load(tmp_path / "a.parquet", template="chatml")
    assert bpe.decode(dataset.tokens[dataset.labels != -100]) == "Paris<|im_end|></s>"


def test_a_folder_is_read_in_the_order_of_names(
    load: Load, bpe: Any, tmp_path: Path, write_jsonl: Any
) -> None:
    write_jsonl("set/b.jsonl", RECORDS[2:])
    write_jsonl("set/a.jsonl", RECORDS[:2])
    write_jsonl("set/.hidden.jsonl", RECORDS)
    (tmp_path / "set" / "README.md").write_text("no records")
    dataset = load(tmp_path / "set")
    assert texts(dataset, bpe) == TEXTS
    assert origins(dataset)[1:3] == [f"{tmp_path}/set/a.jsonl:2", f"{tmp_path}/set/b.jsonl:1"]


def test_a_hugging_face_dataset_object(bpe: Any) -> None:
    import datasets

    found = build_dataset(datasets.Dataset.from_list(RECORDS), bpe, DataSection(), split="eval")
    assert texts(found, bpe) == TEXTS
    assert found.origin(3) == "eval_dataset[3]"


def test_tokens_on_disk_are_a_source(load: Load, bpe: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.array([5, 6, 7, 8, 9], dtype=np.uint16))
    np.save(tmp_path / "offsets.npy", np.array([0, 2, 5]))
    dataset = load(tmp_path)
    assert dataset.tokens.tolist() == [5, 6, 7, 8, 9]
    assert dataset.labels.tolist() == [-100, 6, -100, 8, 9]
    assert origins(dataset) == [f"{tmp_path}[0]", f"{tmp_path}[1]"]
    np.save(tmp_path / "labels.npy", np.array([-100, 6, 7, -100, 9]))
    assert load(tmp_path).labels.tolist() == [-100, 6, -100, -100, 9]


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("offsets", np.array([0, 3, 2, 5]), "offsets that rise from 0 to 5"),
        ("offsets", np.array([0, 4]), "offsets that rise from 0 to 5"),
        ("labels", np.array([1, 2]), "2 labels for 5 tokens"),
        ("tokens", np.array([[1.0]]), "expected one row of integers"),
        ("tokens", np.array([{"a": 1}], dtype=object), "not a readable array"),
        ("offsets", None, "no such file"),
    ],
)
def test_broken_token_folders(load: Load, tmp_path: Path, name: str, array: Any, message: str) -> None:
    """An array of objects would have to be unpickled: it is refused."""
    np.save(tmp_path / "tokens.npy", np.arange(5))
    np.save(tmp_path / "offsets.npy", np.array([0, 5]))
    if array is None:
        (tmp_path / f"{name}.npy").unlink()
    else:
        np.save(tmp_path / f"{name}.npy", array, allow_pickle=True)
    with pytest.raises(DataError, match=rf"{name}.npy: .*{message}"):
        load(tmp_path)


def test_saved_and_mapped_again(load: Load, tmp_path: Path, write_jsonl: Any) -> None:
    first, second = write_jsonl("a.jsonl", RECORDS[:2]), write_jsonl("b.jsonl", RECORDS[2:])
    dataset = load({"path": str(first), "weight": 3.0}, {"path": str(second), "weight": 1.0})
    dataset.save(tmp_path / "saved")
    again = TokenizedDataset.open(tmp_path / "saved")
    assert isinstance(again.tokens, np.memmap)
    for name in TokenizedDataset.ARRAYS:
        np.testing.assert_array_equal(getattr(again, name), getattr(dataset, name))
    assert (again.names, again.weights, again.counts) == (dataset.names, dataset.weights, dataset.counts)
    assert again.fingerprint == dataset.fingerprint
    assert origins(again) == origins(dataset)
    assert load(tmp_path / "saved").fingerprint == dataset.fingerprint


def test_the_fingerprint_sees_every_change(tokenise: Any) -> None:
    """Other tokens, another order, other labels, other cuts between records."""
    whole = {"tokens": [5, 6, 7, 8], "labels": [-100, 6, -100, 8]}
    data_sets: list[list[dict[str, Any]]] = [
        RECORDS,
        RECORDS[::-1],
        RECORDS[:4],
        [whole],
        [{**whole, "labels": [-100, 6, 7, 8]}],
        [{"tokens": [5, 6]}, {"tokens": [7, 8]}],
    ]
    assert len({tokenise(records).fingerprint for records in data_sets}) == len(data_sets)
    assert tokenise(RECORDS).fingerprint == tokenise(list(RECORDS)).fingerprint


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "hello"', r"is not valid JSON: Expecting ',' delimiter at column 17"),
        (b'{"text": "\xff"}', "is not UTF-8 text: invalid start byte at its byte 10"),
        (b'["hello"]', "is no object with fields, it is a list"),
        (b'"hello"', "is no object with fields, it is a str"),
        (b"[" * 100_000, "is nested too deeply"),
    ],
)
def test_bad_lines_are_named_or_skipped(
    load: Load, bpe: Any, tmp_path: Path, line: bytes, message: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "hello"}\n\n' + line + b'\n{"text": "Paris"}\n')
    with pytest.raises(DataError, match=rf"a.jsonl:3: {message}"):
        load(path)
    dataset = load(path, on_bad_record="skip")
    assert texts(dataset, bpe) == ["hello", "Paris"]
    assert sum(dataset.counts.skipped.values()) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": "b"}\n', r"a.json:2: is not valid JSON: Extra data .*to be named .jsonl"),
        (b'[{"text": "a"},\n {"text" "b"}]', r"a.json:2: is not valid JSON"),
        (b'"hello"', "a list of records, or an object with one list, got str"),
        (b'{"a": [], "b": []}', "got an object with 2 lists"),
        (b'{"a": 1}', "got an object with 0 lists"),
        (b"[]", "holds no records"),
        (b"", "a.json:1: is not valid JSON"),
        (b'["\xff"]', "is not UTF-8 text: invalid start byte at byte 2"),
        (b"[" * 100_000, "is nested too deeply"),
    ],
)
def test_broken_json_files(load: Load, tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(path)


def test_missing_and_empty(
    load: Load, tmp_path: Path, write_jsonl: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl("data/train.jsonl", RECORDS)
    write_jsonl("data/empty.jsonl", [])
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "notes.txt").write_text("hello")

    def refused(path: str, message: str) -> None:
        with pytest.raises(DataError, match=message):
            load(path)

    refused(
        "data/trian.jsonl",
        r"data.train: data/trian.jsonl: no such file or folder, did you mean 'train.jsonl'\?",
    )
    refused("dta/train.jsonl", r"dta/train.jsonl: no such file or folder \(nor is there a folder dta\)")
    refused("data/trian.json", "data/trian.json: no such file or folder, did you mean 'train.jsonl'")
    refused("data/empty.jsonl", "data/empty.jsonl: holds no records")
    refused("bare", "bare: the folder holds no .jsonl, .json, .parquet file")
    refused("bare/notes.txt", "bare/notes.txt: expected a .jsonl, .json, .parquet file")
    (tmp_path / "data" / "loop.jsonl").symlink_to("loop.jsonl")
    refused("data", r"data.train: data/loop.jsonl: cannot be read: Too many levels of symbolic links")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no parquet")
    refused("bad.parquet", "bad.parquet: not a readable Parquet file")


def test_hub_names(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    # the library reads HF_HUB_OFFLINE once, when it is first imported
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError, match="data.train: nobody/nothing:test: no such file .* no Hugging Face data set that"
    ):
        load("nobody/nothing:test")


@pytest.mark.parametrize(("path", "module"), [("nobody/nothing", "datasets"), ("a.parquet", "pyarrow")])
def test_missing_libraries(
    load: Load, path: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=f"pip install {module}"):
        load(path)


def test_sections_and_their_weights(load: Load, write_jsonl: Any, bpe: Any) -> None:
    first, second = write_jsonl("a.jsonl", RECORDS[:2]), write_jsonl("b.jsonl", RECORDS[2:])
    dataset = load(first, second)
    assert dataset.weights is None
    assert dataset.groups.tolist() == [0, 0, 1, 1, 1]
    assert load({"path": str(first), "weight": 1.0}, {"path": str(second), "weight": 2.0}).weights == (
        1.0,
        2.0,
    )
    with pytest.raises(DataError, match="data.train: give every source a weight, or none"):
        build_dataset(
            [SourceSection(path=str(first), weight=1.0), SourceSection(path=str(second))],
            bpe,
            DataSection(),
            split="train",
        )


def test_a_source_with_nothing_left_is_refused(load: Load, write_jsonl: Any) -> None:
    """Though others have records: a weight of it could not be met."""
    good, bad = write_jsonl("a.jsonl", RECORDS), write_jsonl("b.jsonl", [{"text": ""}])
    with pytest.raises(
        DataError, match=r'data.train: no record of .*b.jsonl can be used: "text" is empty: 1 \(.*b.jsonl:1\)'
    ):
        load(good, bad, on_bad_record="skip")
