"""Tensors in a folder, in one process: round trips, refusals, damaged and hostile folders, memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from collie_core.checkpoint.store import load_tensors, read_metadata, save_tensors, stream_tensors
from collie_core.errors import CheckpointError
from collie_core.safetensors_writer import DTYPE_NAMES

TENSORS = "tensors_00000.safetensors"


def sample() -> dict[str, Tensor]:
    storage = torch.randn(500, 400)
    state = {
        f"dtype.{name}": torch.arange(24).reshape(2, 12).to(dtype) for dtype, name in DTYPE_NAMES.items()
    }
    return state | {
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 5),
        "view": storage[3:9],
        "transposed": storage.T,
        "parameter": torch.nn.Parameter(torch.randn(4, 4)),
    }


def raw(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def raw_state(state: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    return {name: (tensor.dtype, tensor.shape, raw(tensor)) for name, tensor in state.items()}


def blank(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in state.items()}


def test_every_kind_of_tensor_comes_back_byte_equal(tmp_path: Path) -> None:
    state = sample()
    save_tensors(state, tmp_path / "a")
    loaded = blank(state)
    places = {name: tensor.data_ptr() for name, tensor in loaded.items()}
    load_tensors(loaded, tmp_path / "a")
    assert raw_state(loaded) == raw_state(state)
    assert {name: tensor.data_ptr() for name, tensor in loaded.items()} == places  # in place
    assert raw_state(dict(stream_tensors(tmp_path / "a"))) == raw_state(state)


def test_the_folder_holds_safetensors_and_json_only(tmp_path: Path) -> None:
    state = sample()
    save_tensors(state, tmp_path / "a")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["metadata.json", TENSORS]
    assert raw_state(load_file(tmp_path / "a" / TENSORS)) == raw_state(state)
    content = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    assert (tmp_path / "a" / TENSORS).stat().st_size < content * 1.01


def test_a_non_contiguous_target_is_filled(tmp_path: Path) -> None:
    tensor = torch.randn(6, 4)
    save_tensors({"w": tensor}, tmp_path)
    target = torch.zeros(4, 12).T[::2]
    load_tensors({"w": target}, tmp_path)
    assert torch.equal(target, tensor)


def test_a_subset_of_names(tmp_path: Path) -> None:
    state = {name: torch.randn(3) for name in ("model.a", "model.b", "optimizer.a")}
    save_tensors(state, tmp_path)
    part = {"model.b": torch.zeros(3)}
    load_tensors(part, tmp_path)
    assert torch.equal(part["model.b"], state["model.b"])
    assert [name for name, _ in stream_tensors(tmp_path, ["optimizer.a", "model.a"])] == [
        "optimizer.a",
        "model.a",
    ]
    with pytest.raises(CheckpointError, match="holds no tensor 'model.c', did you mean 'model"):
        list(stream_tensors(tmp_path, ["model.c"]))


def test_misfits_are_all_named_before_anything_changes(tmp_path: Path) -> None:
    save_tensors({"a": torch.ones(2), "b": torch.ones(2, 3), "c": torch.ones(2)}, tmp_path)
    state = {"a": torch.zeros(2), "b": torch.zeros(3, 2), "c": torch.zeros(2).bfloat16(), "e": torch.zeros(1)}
    with pytest.raises(CheckpointError) as caught:
        load_tensors(state, tmp_path)
    message = str(caught.value)
    assert "b is [2, 3] torch.float32, expected [3, 2] torch.float32" in message
    assert "c is [2] torch.float32, expected [2] torch.bfloat16" in message
    assert "e is missing" in message
    assert not state["a"].any()
    with pytest.raises(CheckpointError) as caught:
        load_tensors(state, tmp_path)
    assert "unexpected" not in str(caught.value)


def test_what_is_no_tensor_is_refused_by_name(tmp_path: Path) -> None:
    state: dict[str, Any] = {"w": torch.ones(2), "epoch": 3}
    with pytest.raises(CheckpointError, match="'epoch' is no tensor"):
        save_tensors(state, tmp_path)
    with pytest.raises(CheckpointError, match="'z': torch.complex128 cannot be stored"):
        save_tensors({"z": torch.ones(2, dtype=torch.complex128)}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def set_chunk(**entries: Any) -> Callable[[dict[str, Any]], None]:
    return lambda metadata: metadata["tensors"]["w"]["chunks"][0].update(entries)


def set_tensor(**entries: Any) -> Callable[[dict[str, Any]], None]:
    return lambda metadata: metadata["tensors"]["w"].update(entries)


def set_top(**entries: Any) -> Callable[[dict[str, Any]], None]:
    return lambda metadata: metadata.update(entries)


def two_chunks(first: list[int], second: list[int]) -> Callable[[dict[str, Any]], None]:
    """Chunks of whole rows [start, number of rows]."""
    rows = [
        {"file": TENSORS, "offsets": [start, 0], "sizes": [number, 3]} for start, number in (first, second)
    ]
    return set_tensor(chunks=rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_chunk(file="../secret.safetensors"), "is not a tensor file of this folder"),
        (set_chunk(file="/etc/passwd"), "is not a tensor file of this folder"),
        (set_chunk(file=f"sub/{TENSORS}"), "is not a tensor file of this folder"),
        (set_chunk(file=f"{TENSORS}/../../x"), "is not a tensor file of this folder"),
        (set_chunk(file="tensors_00001.safetensors"), "is not a tensor file of this folder"),
        (set_chunk(offsets=[1, 0]), "exceeds shape"),
        (set_chunk(offsets=[-1, 0]), "greater than or equal to 0"),
        (set_chunk(offsets=[0]), "another number of dimensions"),
        (set_chunk(sizes=[3, 3]), "do not cover"),
        (set_chunk(sizes=[2**70, 3]), "less than"),
        (set_chunk(sizes=[4.0, 3]), "valid integer"),
        (set_chunk(sizes=[True, 3]), "valid integer"),
        (set_chunk(sizes="43"), "valid (array|tuple)"),
        (set_tensor(chunks=[]), "do not cover"),
        (two_chunks([0, 3], [1, 1]), "do not cover"),
        (set_tensor(shape=[5, 3]), "do not cover"),
        (set_tensor(dtype="PICKLE"), "unknown dtype"),
        (set_tensor(dtype="I32"), "metadata.json says .4, 3. torch.int32"),
        (set_top(tensors=[]), "should be an object"),
        (set_top(format="other"), "collie-tensors"),
        (set_top(version=2), "format version 2"),
        (set_top(files={TENSORS: {"sha256": "x", "size": 1}}), "sha256"),
    ],
)
def test_hostile_metadata_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    folder = tmp_path / "a"
    save_tensors({"w": torch.ones(4, 3)}, folder)
    metadata = json.loads((folder / "metadata.json").read_text())
    change(metadata)
    (folder / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(CheckpointError, match=message):
        list(stream_tensors(folder))


@pytest.mark.parametrize("text", ["", "null", "[", "[" * 100_000, '{"tensors": {', "\x80\x04\x95"])
def test_metadata_that_are_no_json_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "metadata.json").write_text(text)
    with pytest.raises(CheckpointError, match="metadata.json"):
        read_metadata(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"metadata.json cannot be read: No such file"):
        load_tensors({}, tmp_path)
    save_tensors({"w": torch.ones(4, 3)}, tmp_path)
    (tmp_path / TENSORS).unlink()
    with pytest.raises(CheckpointError, match=rf"{TENSORS}.*'w' cannot be read"):
        load_tensors({"w": torch.ones(4, 3)}, tmp_path)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 50, 100, -1])
def test_a_truncated_tensor_file_is_refused(tmp_path: Path, keep: int) -> None:
    save_tensors({"w": torch.ones(4, 3)}, tmp_path)
    data = (tmp_path / TENSORS).read_bytes()
    (tmp_path / TENSORS).write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match=rf"{TENSORS}.*cannot be read"):
        load_tensors({"w": torch.zeros(4, 3)}, tmp_path)


MEMORY_SCRIPT = """
import gc, sys, torch
from collie_core.checkpoint.store import load_tensors, save_tensors

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024

def growth(action):
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    before = status("VmRSS")
    action()
    return status("VmHWM") - before

torch.set_num_threads(1)
state = {f"w{i}": torch.randn(25, 2**20) for i in range(3)} | {"transposed": torch.randn(2**20, 25).T}
save_tensors({"small": torch.randn(2**22)}, sys.argv[1] + "/warm")  # threads, lazy imports
print(growth(lambda: save_tensors(state, sys.argv[1] + "/a")))
print(growth(lambda: load_tensors(state, sys.argv[1] + "/a")))
"""


def test_saving_and_loading_400_mb_takes_the_memory_of_one_tensor(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEMORY_SCRIPT, str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100).stdout
    saving, loading = map(float, output.split())
    assert saving < 1.2 * 100
    assert loading < 1.2 * 100
