"""A checkpoint's manifest finds every file that was cut, changed, lost or replaced."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from collie_core.checkpoint.manifest import read_manifest, verify, write_manifest
from collie_core.checkpoint.store import save_tensors
from collie_core.errors import CheckpointError

TENSORS = "tensors_00000.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Tensors (hashed by their writer), a JSON file and a file in a subfolder (hashed by the manifest)."""
    folder = tmp_path / "step_000003"
    save_tensors({"w": torch.randn(60, 5), "b": torch.randn(7)}, folder)
    (folder / "state.json").write_text('{"epoch": 1}\n')
    (folder / "adapter").mkdir()
    (folder / "adapter" / "notes.txt").write_text("rank 8")
    write_manifest(folder, 3)
    return folder


FILES = [TENSORS, "metadata.json", "state.json", "adapter/notes.txt"]


def test_a_whole_folder_is_accepted(folder: Path) -> None:
    manifest = verify(folder)
    assert (manifest.step, sorted(manifest.files)) == (3, sorted(FILES))
    assert verify(folder, "size") == manifest


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_is_found(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    for position in {0, len(data) // 3, len(data) // 2, len(data) - 1}:
        flipped = bytearray(data)
        flipped[position] ^= 1 << (position % 8)
        (folder / name).write_bytes(flipped)
        with pytest.raises(CheckpointError, match=f"{name} is damaged: sha256"):
            verify(folder)
        verify(folder, "size")  # which does not promise to find it
    (folder / name).write_bytes(data)
    verify(folder)


@pytest.mark.parametrize("mode", ["full", "size"])
@pytest.mark.parametrize("name", FILES)
def test_a_truncated_or_longer_file_is_found(folder: Path, name: str, mode: str) -> None:
    data = (folder / name).read_bytes()
    for length in {0, 1, len(data) // 2, len(data) - 1}:
        (folder / name).write_bytes(data[:length])
        with pytest.raises(
            CheckpointError, match=f"{name} is truncated: {length} bytes instead of {len(data)}"
        ):
            verify(folder, mode)  # type: ignore[arg-type]
    (folder / name).write_bytes(data + b" ")
    with pytest.raises(CheckpointError, match=f"{name} is damaged: {len(data) + 1} bytes"):
        verify(folder, mode)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_or_replaced_file_is_found(folder: Path, name: str) -> None:
    elsewhere = folder.with_name("elsewhere")
    (folder / name).rename(elsewhere)
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        verify(folder)
    (folder / name).symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match=f"{name} is no regular file"):
        verify(folder)
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(CheckpointError, match=f"{name} is no regular file"):
        verify(folder)


def test_every_single_flipped_bit_of_the_manifest_is_found(folder: Path) -> None:
    path = folder / "manifest.json"
    data = path.read_bytes()
    for position in range(len(data)):
        for bit in range(8):
            path.write_bytes(data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :])
            with pytest.raises(CheckpointError, match=r"manifest\.json|is missing"):
                verify(folder, "size")


def test_a_folder_without_a_manifest_is_unfinished(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing: the checkpoint was not finished"):
        verify(folder)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", "./state.json", "", "adapter//x"])
def test_a_manifest_that_leaves_its_folder_is_refused(folder: Path, name: str) -> None:
    (folder.parent / "outside").write_text("secret")
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    content["files"][name] = content["files"]["state.json"]
    forge(path, content)
    with pytest.raises(CheckpointError, match="is no file of the checkpoint"):
        read_manifest(folder)


def test_a_newer_format_is_refused(folder: Path) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text()) | {"version": 2}
    forge(path, content)
    with pytest.raises(CheckpointError, match="format version 2; this version reads 1"):
        verify(folder)


def forge(path: Path, content: dict[str, object]) -> None:
    """Write a manifest with a true checksum, as an attacker would."""
    import hashlib

    del content["checksum"]
    checksum = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(content | {"checksum": checksum}))


def test_the_hash_of_the_writer_is_used_and_true(folder: Path) -> None:
    written = json.loads((folder / "metadata.json").read_text())["files"][TENSORS]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["files"][TENSORS] == written


def test_a_strangers_metadata_file_is_hashed_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "metadata.json").write_text('{"author": "me"}')
    write_manifest(tmp_path, 1)
    verify(tmp_path)


def test_a_tensor_file_that_is_not_there_or_not_whole_ends_the_save(folder: Path) -> None:
    whole = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=f"{TENSORS} is truncated"):
        write_manifest(folder, 3)
    (folder / TENSORS).unlink()
    with pytest.raises(CheckpointError, match=f"{TENSORS} is missing"):
        write_manifest(folder, 3)
