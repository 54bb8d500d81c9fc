"""Damaged, incomplete and poisoned model folders: refused by file and name, and nothing is executed."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from collie_core import AutoModelForCausalLM, AutoTokenizer
from collie_core.errors import CheckpointError, ConfigError, UserError


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    """A sound model folder of its own."""
    target = tmp_path / "model"
    target.mkdir()
    for path in tiny_llama.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def refused(folder: Path, *parts: str, error: type[Exception] = CheckpointError) -> None:
    with pytest.raises(error) as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    for part in parts:
        assert part in str(caught.value), f"{part!r} not in: {caught.value}"


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_missing_unexpected_and_misshapen_tensors_are_listed_together(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["model.layers.0.mlp.up_proj.weight"]
        del tensors["lm_head.weight"]
        tensors["model.layers.7.extra"] = torch.zeros(2)
        tensors["model.norm.weight"] = torch.zeros(31)

    rewrite(folder, change)
    refused(
        folder,
        str(folder),
        "missing: model.layers.0.mlp.up_proj.weight, lm_head.weight",
        "unexpected: model.layers.7.extra",
        "of a wrong shape: model.norm.weight ([31] in the file, the config asks for [32])",
    )


def test_a_config_of_another_size(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    refused(folder, "missing: model.layers.2.input_layernorm.weight")
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 321}))
    refused(folder, "model.embed_tokens.weight ([320, 32] in the file, the config asks for [321, 32])")


@pytest.mark.parametrize("keep", [4, 40, 3000, -1])
def test_truncated_safetensors(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, str(path), "truncated" if keep == -1 or keep == 3000 else "header")


def header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    content = json.loads(data[8 : 8 + length])
    change(content)
    text = json.dumps(content).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize(
    "value",
    [
        {"dtype": "F32", "shape": [320, 32], "data_offsets": [0, 40]},
        {"dtype": "F33", "shape": [320, 32], "data_offsets": [0, 40960]},
        {"dtype": "F32", "shape": [-320, -32], "data_offsets": [0, 40960]},
        {"dtype": "F32", "shape": "ab", "data_offsets": [0, 40960]},
        {"dtype": "F32", "shape": [320, 32], "data_offsets": [64, 64 + 40960]},
        {"dtype": "F32", "shape": [320, 32]},
        [],
    ],
)
def test_bad_headers(folder: Path, value: Any) -> None:
    path = folder / "model.safetensors"
    header(path, lambda content: content.update({"model.embed_tokens.weight": value}))
    refused(folder, str(path), "damaged")


def test_other_files_under_the_name(folder: Path) -> None:
    path = folder / "model.safetensors"
    for content in (
        b"",
        b"\xff" * 200,
        struct.pack("<Q", 5) + b"[1,2]",
        b"version https://git-lfs.github.com/spec",
    ):
        path.write_bytes(content)
        refused(folder, str(path))


class Poison:
    """Runs a command when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.target}",)


def test_poisoned_bin_runs_nothing(folder: Path, tmp_path: Path) -> None:
    tensors: dict[str, Any] = dict(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    mark = tmp_path / "executed"
    for new_format in (True, False):
        torch.save(
            tensors | {"poison": Poison(mark)},
            folder / "pytorch_model.bin",
            _use_new_zipfile_serialization=new_format,
        )
        refused(folder, str(folder / "pytorch_model.bin"), "could run code, and is refused", "posix.system")
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"abc", b"PK\x03\x04" + b"\0" * 50, b"\x80\x02."])
def test_damaged_bin(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    refused(folder, str(folder / "pytorch_model.bin"), "is damaged")


def test_truncated_bin(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:20_000])
    refused(folder, str(path))


def test_a_bin_with_more_than_tensors(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"state_dict": {"a": torch.zeros(2)}}, folder / "pytorch_model.bin")
    refused(folder, "expected a mapping from names to tensors alone")


def shard(folder: Path) -> Path:
    """The model in two shards; returns the index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for number in range(2):
        part = dict(list(tensors.items())[number::2])
        save_file(part, folder / f"model-0000{number + 1}-of-00002.safetensors")
        weight_map |= dict.fromkeys(part, f"model-0000{number + 1}-of-00002.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_shards(folder: Path) -> None:
    index = shard(folder)
    AutoModelForCausalLM.from_pretrained(folder)
    content = json.loads(index.read_text())
    second = folder / "model-00002-of-00002.safetensors"
    saved = second.read_bytes()
    second.unlink()
    refused(folder, str(second), "no such file, but model.safetensors.index.json names it")
    second.write_bytes(saved[:-8])
    refused(folder, str(second), "truncated")
    second.write_bytes(saved)
    moved = content["weight_map"] | {"model.norm.weight": "model-00001-of-00002.safetensors"}
    other = [name for name, file in content["weight_map"].items() if file.startswith("model-00002")][0]
    moved[other] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps({"weight_map": moved}))
    refused(folder, f"lacks tensor {other!r}")
    for text in ("{", "[]", '{"weight_map": 3}'):
        index.write_text(text)
        refused(folder, str(index), "damaged index")
    for file in ("../secret.safetensors", "/etc/passwd"):
        index.write_text(json.dumps({"weight_map": {"a": file}}))
        refused(folder, str(index), "no file of this folder")


def test_folders_that_are_no_models(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, f"{folder}: no weights; expected model.safetensors", "found config.json")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, f"{empty}: no config.json")
    refused(tmp_path / "absent", f"{tmp_path / 'absent'}: no such folder")
    refused(folder / "config.json", "is a file; expected a folder")


def test_configs(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text("{nonsense")
    refused(folder, str(path), "cannot be read")
    path.write_text("[1]")
    refused(folder, str(path), "expected a JSON object, found list")
    path.write_text(json.dumps({key: value for key, value in config.items() if key != "model_type"}))
    refused(folder, str(path), "has no model_type; name the model plugin with model.provider")
    AutoModelForCausalLM.from_pretrained(folder, provider="llama")
    path.write_text(json.dumps(config | {"model_type": "lama"}))
    refused(folder, str(path), "model_type", "'lama'", "'llama'", error=UserError)  # by collie-hf, if there
    path.write_text(json.dumps(config | {"hidden_act": "mish"}))
    refused(folder, str(path), "hidden_act: 'mish' is not supported", error=ConfigError)


def test_remote_code_is_never_followed(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    code = f"open({str(mark)!r}, 'w')\nclass A: pass\n"
    for name in ("modeling.py", "tokenization.py", "configuration.py"):
        (folder / name).write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration.A", "AutoModelForCausalLM": "modeling.A"}
    (folder / "config.json").write_text(json.dumps(config))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["tokenization.A", "tokenization.A"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)("What")["input_ids"]
    assert not mark.exists()


def test_damaged_tokenizers(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="tokenizer.json: cannot be read"):
        AutoTokenizer.from_pretrained(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer: expected tokenizer.model or tokenizer.json"):
        AutoTokenizer.from_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(b"\x80\x04nonsense")
    with pytest.raises(CheckpointError, match="tokenizer.model: is no sentencepiece model"):
        AutoTokenizer.from_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("[")
    with pytest.raises(CheckpointError, match="tokenizer_config.json: cannot be read"):
        AutoTokenizer.from_pretrained(folder)
