"""Checkpoints of every kind of file: loaded, saved, and read by transformers with the same tensors."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer as StockTokenizer
from transformers import LlamaConfig
from transformers import LlamaForCausalLM as StockLlama

from collie_core import AutoModelForCausalLM
from collie_core.cli.main import main
from collie_core.errors import CheckpointError
from collie_core.models.export import export_pretrained
from collie_core.models.weight_files import WeightReader

KINDS = ["safetensors", "safetensors_sharded", "bin", "bin_sharded", "bin_legacy"]


def stock_model(tied: bool = False) -> StockLlama:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return StockLlama(config).eval()


def write(
    folder: Path, kind: str, model: StockLlama, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """A checkpoint of a kind of files; returns the tensors in it."""
    folder.mkdir()
    config = model.config.to_dict() | {"torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.detach().to(dtype).contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    if kind == "safetensors":
        save_file(tensors, folder / "model.safetensors")
    elif kind in ("bin", "bin_legacy"):
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "bin")
    else:
        stem, suffix = ("model", "safetensors") if "safe" in kind else ("pytorch_model", "bin")
        weight_map: dict[str, str] = {}
        for number in range(3):
            file = f"{stem}-{number + 1:05}-of-00003.{suffix}"
            part = dict(list(tensors.items())[number::3])
            weight_map |= dict.fromkeys(part, file)
            save_file(part, folder / file) if "safe" in kind else torch.save(part, folder / file)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return tensors


def ids() -> Tensor:
    return torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_load_save_and_read_by_transformers(kind: str, tied: bool, tmp_path: Path) -> None:
    stock = stock_model(tied)
    tensors = write(tmp_path / "source", kind, stock)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    torch.testing.assert_close(model(ids()).logits, stock(ids()).logits, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "out")

    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[name], tensors[name]) for name in tensors)
    again: Any
    info: Any
    again, info = StockLlama.from_pretrained(tmp_path / "out", output_loading_info=True)  # type: ignore[misc]
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(again(ids()).logits, model(ids()).logits, atol=1e-5, rtol=1e-5)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(ours(ids()).logits, model(ids()).logits)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model.norm.weight": None}, "missing: model.norm.weight"),
        ({"model.extra.weight": torch.ones(2)}, "unexpected: model.extra.weight"),
        ({"model.norm.weight": torch.ones(32, dtype=torch.int8)}, "quantised.*model.norm.weight"),
    ],
)
def test_weights_that_do_not_fit_are_not_exported(
    change: dict[str, Tensor | None], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "source", "safetensors", stock_model())
    file = tmp_path / "source" / "model.safetensors"
    changed = {**load_file(file), **change}
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, file)
    assert main(["export", str(tmp_path / "source"), str(tmp_path / "out")]) == 2
    assert re.search(expected, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_sharded_export(tmp_path: Path) -> None:
    write(tmp_path / "source", "bin", stock_model())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    origin = model.origin
    assert origin is not None
    named = [(name, p.detach()) for name, p in model.named_parameters()]
    export_pretrained(
        tmp_path / "out", origin.provider, origin.config, origin.hf_config, named, max_shard_bytes=20_000
    )
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    total = 0
    for file in files:
        with safe_open(tmp_path / "out" / file, "pt") as opened:
            names = list(opened.keys())
            size = sum(opened.get_tensor(name).nbytes for name in names)
        assert size <= 20_000 or len(names) == 1
        assert all(index["weight_map"][name] == file for name in names)
        total += size
    assert index["metadata"]["total_size"] == total
    stock = StockLlama.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(stock(ids()).logits, model(ids()).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_casts_while_loading(stored: torch.dtype, wanted: torch.dtype, tmp_path: Path) -> None:
    tensors = write(tmp_path / "source", "safetensors", stock_model(), stored)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=wanted)
    found = dict(model.named_parameters())["blocks.1.mlp.up_proj.weight"]
    assert torch.equal(found, tensors["model.layers.1.mlp.up_proj.weight"].to(wanted))
    model.save_pretrained(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    name = str(wanted).removeprefix("torch.")
    assert {config.get("dtype", name), config.get("torch_dtype", name)} == {name}


def test_a_file_is_as_large_as_its_tensors(tmp_path: Path) -> None:
    """Parameters that are views of one storage: only their own elements are written."""
    write(tmp_path / "source", "safetensors", stock_model())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                storage = torch.zeros(*parameter.shape[:-1], parameter.shape[-1] * 50)
                view = storage[..., : parameter.shape[-1]].copy_(parameter)
                setattr(module, name, torch.nn.Parameter(view))
    model.save_pretrained(tmp_path / "out")
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    tensors = sum(p.numel() * p.element_size() for p in model.parameters())
    header = len((tmp_path / "source" / "model.safetensors").read_bytes()) - tensors
    assert math.isclose(size - header, tensors, rel_tol=0.01)


def test_tied_weights_stay_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stock = stock_model(tied=True)
    tensors = write(tmp_path / "source", "safetensors", stock)
    embedding = tensors["model.embed_tokens.weight"]
    for name, copy in {"equal": embedding.clone(), "other": embedding + 1}.items():
        folder = tmp_path / name
        shutil.copytree(tmp_path / "source", folder)
        save_file(tensors | {"lm_head.weight": copy}, folder / "model.safetensors")
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            model = AutoModelForCausalLM.from_pretrained(folder)
        assert ("lm_head.weight differs" in caplog.text) == (name == "other")
        parameters = dict(model.named_parameters(remove_duplicate=False))
        assert parameters["head.lm_head.weight"] is parameters["embed.tokens.weight"]
        torch.testing.assert_close(model(ids()).logits, stock(ids()).logits, atol=1e-5, rtol=1e-5)
        model.save_pretrained(folder)  # into the folder that it came from
        assert "lm_head.weight" not in load_file(folder / "model.safetensors")
        torch.testing.assert_close(
            StockLlama.from_pretrained(folder)(ids()).logits, stock(ids()).logits, atol=1e-5, rtol=1e-5
        )


def test_a_tied_tensor_under_the_name_of_the_head_alone(tmp_path: Path) -> None:
    """As safetensors' own `save_model` leaves it, which keeps the first name of a tensor."""
    stock = stock_model(tied=True)
    tensors = write(tmp_path / "source", "safetensors", stock)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    torch.testing.assert_close(model(ids()).logits, stock(ids()).logits, atol=1e-5, rtol=1e-5)
    assert main(["export", str(tmp_path / "source"), str(tmp_path / "out")]) == 0
    assert "model.embed_tokens.weight" in load_file(tmp_path / "out" / "model.safetensors")
    again = StockLlama.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(again(ids()).logits, stock(ids()).logits, atol=1e-5, rtol=1e-5)
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: model\.embed_tokens\.weight$"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "source")


def test_configs_and_tokenizer_travel_along(tiny_llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_llama, source)
    config = json.loads((source / "config.json").read_text()) | {"unsloth_version": "2024.9"}
    (source / "config.json").write_text(json.dumps(config))
    (source / "modeling_evil.py").write_text("raise SystemExit")
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config
    assert (tmp_path / "out" / "generation_config.json").is_file()
    assert not (tmp_path / "out" / "modeling_evil.py").exists()
    text = "What does it return?"
    expected = StockTokenizer.from_pretrained(source)(text)["input_ids"]
    assert StockTokenizer.from_pretrained(tmp_path / "out")(text)["input_ids"] == expected


def test_a_later_save_replaces_an_earlier_one(tmp_path: Path) -> None:
    write(tmp_path / "source", "safetensors", stock_model())
    out = tmp_path / "out"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    origin = model.origin
    assert origin is not None
    named = [(name, p.detach()) for name, p in model.named_parameters()]
    export_pretrained(out, origin.provider, origin.config, origin.hf_config, named, max_shard_bytes=20_000)
    (out / "notes.txt").write_text("mine")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    model.save_pretrained(out)
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors", "notes.txt"]
    assert torch.equal(AutoModelForCausalLM.from_pretrained(out)(ids()).logits, model(ids()).logits)


def test_a_save_that_fails_leaves_the_earlier_one(tmp_path: Path) -> None:
    write(tmp_path / "source", "safetensors", stock_model())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    model.save_pretrained(tmp_path / "out")
    expected = model(ids()).logits
    origin = model.origin
    assert origin is not None

    def failing() -> Any:
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if number == 5:
                raise OSError("disk full")
            yield name, parameter.detach() * 3

    with pytest.raises(OSError, match="disk full"):
        export_pretrained(
            tmp_path / "out", origin.provider, origin.config, origin.hf_config, failing(), replace=True
        )
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids()).logits, expected)


MEASURE = """
import sys
import torch
from pathlib import Path
from collie_core import AutoModelForCausalLM
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
source, out, dtype = sys.argv[1:]
config = {"model_type": "llama", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64,
          "num_hidden_layers": 1, "num_attention_heads": 2}
tiny = AutoModelForCausalLM.from_config(config)   # what torch needs once, not counted
tiny.save_pretrained(Path(out) / "tiny")
AutoModelForCausalLM.from_pretrained(Path(out) / "tiny")
before = peak()
model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
for parameter in model.parameters():
    parameter.detach().sum()  # pages of a file are read when they are used
size = sum(p.numel() * p.element_size() for p in model.parameters())
loaded = peak()
model.save_pretrained(Path(out) / "saved")
print(size, loaded - before - size, peak() - loaded)
"""


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("safetensors_sharded", "float32"), ("safetensors", "bfloat16"), ("bin_sharded", "float32")],
)
def test_memory_beside_the_model(kind: str, dtype: str, tmp_path: Path) -> None:
    """Two tensors (and pages of a mapped .bin) while loading; next to nothing while saving."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4000,
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    with torch.device("meta"):
        stock = StockLlama(config)
    stock = stock.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.fill_(1.0)
    write(tmp_path / "source", kind, stock)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "source"), str(tmp_path), dtype],
        check=True,
        capture_output=True,
        text=True,
    )
    size, loading, saving = map(int, done.stdout.split())
    assert size > 125e6
    allowed = 100e6  # the file is 300 MB
    assert loading < allowed, f"loading took {loading / 1e6:.0f} MB beside the model"
    assert saving < 40e6, f"saving took {saving / 1e6:.0f} MB"


def test_a_reader_knows_names_shapes_and_files(tmp_path: Path) -> None:
    for kind in KINDS:
        tensors = write(tmp_path / kind, kind, stock_model(), torch.bfloat16)
        reader = WeightReader(tmp_path / kind)
        assert set(reader.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert reader.shape(name) == tuple(tensor.shape) and reader.dtype(name) == torch.bfloat16
            assert reader.file(name).is_file() and name in reader
            assert torch.equal(reader.get(name), tensor)
            wide = torch.empty(*tensor.shape[::-1]).permute(*range(tensor.ndim)[::-1])  # other strides, dtype
            reader.read_into(name, wide)
            assert torch.equal(wide, tensor.float())


def test_mapped_weights_are_private_and_outlive_their_folder(tmp_path: Path) -> None:
    tensors = write(tmp_path / "source", "safetensors", stock_model())
    content = (tmp_path / "source" / "model.safetensors").read_bytes()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert (tmp_path / "source" / "model.safetensors").read_bytes() == content
    shutil.rmtree(tmp_path / "source")
    found = model.get_parameter("blocks.0.mlp.up_proj.weight")
    assert torch.equal(found, tensors["model.layers.0.mlp.up_proj.weight"] + 1)


def test_tensors_at_odd_places_are_copied(tmp_path: Path) -> None:
    tensors = write(tmp_path / "source", "safetensors", stock_model())
    path = tmp_path / "source" / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    path.write_bytes((length + 1).to_bytes(8, "little") + data[8 : 8 + length] + b" " + data[8 + length :])
    assert WeightReader(tmp_path / "source").mapped("model.norm.weight") is None
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    assert torch.equal(model.get_parameter("embed.tokens.weight"), tensors["model.embed_tokens.weight"])
