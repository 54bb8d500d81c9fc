"""Pickles that run code when they are loaded: wherever they are put in a checkpoint, nothing is executed."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch

from collie_core.checkpoint.manager import CheckpointManager
from collie_core.checkpoint.manifest import write_manifest
from collie_core.checkpoint.rng import restore_rng
from collie_core.checkpoint.store import load_tensors, read_metadata, save_tensors, stream_tensors
from collie_core.errors import CheckpointError


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "executed"


@pytest.fixture
def poison(tmp_path: Path, marker: Path) -> bytes:
    """A file of torch.save that makes `marker` when it is loaded without weights_only."""
    path = tmp_path / "poison.pt"
    torch.save({"state": Payload(marker)}, path)
    torch.load(path, weights_only=False)  # the poison works
    marker.rmdir()
    return path.read_bytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    manager = CheckpointManager(tmp_path / "run")
    return manager.save(1, lambda folder: save_tensors({"w": torch.ones(3)}, folder), {"step": 1})


def use(folder: Path) -> None:
    """Everything that is ever read from a checkpoint."""
    checkpoint = CheckpointManager(folder.parent.parent).open(folder)
    state = checkpoint.state()
    read_metadata(checkpoint.path)
    loaded = {"w": torch.zeros(3)}
    load_tensors(loaded, checkpoint.path)
    assert loaded["w"].min() == 1.0
    assert dict(stream_tensors(checkpoint.path))["w"].min() == 1.0
    if "rng" in state:
        restore_rng(state["rng"])


def state_size(folder: Path, name: str) -> None:
    """Make the metadata fit what has taken the place of a tensor file."""
    content = json.loads((folder / "metadata.json").read_text())
    data = (folder / name).read_bytes()
    content["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    (folder / "metadata.json").write_text(json.dumps(content))


ADDED = [
    ".metadata",  # what torch.distributed.checkpoint unpickles
    "__0_0.distcp",
    "model.pt",
    "optimizer.pt",
    "pytorch_model.bin",
    "training_args.bin",
    "rng.pkl",
    "state.pkl",
    "data.pkl",
    "tensors_00001.safetensors",
]


@pytest.mark.parametrize("name", ADDED)
@pytest.mark.parametrize("listed", [False, True], ids=["unlisted", "listed"])
def test_an_added_pickle_is_never_opened(
    folder: Path, poison: bytes, marker: Path, name: str, listed: bool
) -> None:
    (folder / name).write_bytes(poison)
    if listed:
        write_manifest(folder, 1)
    use(folder)
    assert not marker.exists()


@pytest.mark.parametrize(
    "name", ["tensors_00000.safetensors", "metadata.json", "state.json", "manifest.json"]
)
def test_a_pickle_in_place_of_a_file_is_refused(folder: Path, poison: bytes, marker: Path, name: str) -> None:
    (folder / name).write_bytes(poison)
    with pytest.raises(CheckpointError, match=name):
        use(folder)
    if name != "manifest.json":  # an attacker also makes the manifest fit
        if name.startswith("tensors"):
            state_size(folder, name)
        write_manifest(folder, 1)
        with pytest.raises(CheckpointError, match=name):
            use(folder)
    assert not marker.exists()


def test_a_byte_entry_in_the_metadata_is_refused(folder: Path, poison: bytes, marker: Path) -> None:
    (folder / "tensors_00001.safetensors").write_bytes(poison)
    metadata = json.loads((folder / "metadata.json").read_text())
    entry = {"file": "tensors_00001.safetensors", "offsets": [0], "sizes": [len(poison)]}
    record = {"sha256": hashlib.sha256(poison).hexdigest(), "size": len(poison)}
    metadata["files"]["tensors_00001.safetensors"] = record
    metadata["tensors"]["w"] |= {"dtype": "U8", "shape": [len(poison)], "chunks": [entry]}
    (folder / "metadata.json").write_text(json.dumps(metadata))
    write_manifest(folder, 1)
    with pytest.raises(CheckpointError, match="does not fit"):
        use(folder)
    with pytest.raises(CheckpointError, match="tensors_00001.safetensors"):
        dict(stream_tensors(folder))
    assert not marker.exists()


def test_a_pickle_in_the_state_of_the_generators_is_refused(
    folder: Path, poison: bytes, marker: Path
) -> None:
    import base64

    text = base64.b64encode(poison).decode()
    (folder / "state.json").write_text(json.dumps({"rng": {"python": text, "numpy": text, "torch": text}}))
    write_manifest(folder, 1)
    with pytest.raises(CheckpointError, match="random generators is malformed"):
        use(folder)
    assert not marker.exists()
