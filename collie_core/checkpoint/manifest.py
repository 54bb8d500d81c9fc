"""`manifest.json`, the last file of a checkpoint: step, sha256 and size of every other file.

A folder without it was never finished; with it, any file that was cut, changed or lost since is found.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from collie_core.checkpoint.metadata import METADATA_FILE, FileRecord, describe, read_metadata
from collie_core.errors import CheckpointError
from collie_core.files import write_json_atomic

MANIFEST_FILE = "manifest.json"
VERSION = 1

Verify = Literal["full", "size"]


@dataclass(frozen=True)
class Manifest:
    """What a whole checkpoint consists of; `checksum` is the sha256 of the other fields as JSON."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    format: Literal["collie-checkpoint"]
    version: int
    step: Annotated[int, Field(ge=0)]
    files: dict[str, FileRecord]
    checksum: str


_ADAPTER = TypeAdapter(Manifest)


def write_manifest(folder: Path, step: int) -> Manifest:
    """Record every regular file of `folder`.

    A tensor file's hash is the one that its writer computed (in its `metadata.json`); others are read.
    Raises CheckpointError where a tensor file is not there, or not whole.
    """
    names = [name for name in _regular_files(folder) if name != MANIFEST_FILE]
    known = _hashed_by_writers(folder, names)
    rest = [name for name in names if name not in known]
    with _threads() as pool:
        known |= zip(rest, pool.map(lambda name: _record(folder / name), rest), strict=True)
    manifest = Manifest("collie-checkpoint", VERSION, step, {name: known[name] for name in names}, "")
    manifest = replace(manifest, checksum=_checksum(manifest))
    write_json_atomic(folder / MANIFEST_FILE, asdict(manifest))
    return manifest


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Read and check `manifest.json` alone; raises CheckpointError."""
    path = Path(folder) / MANIFEST_FILE
    try:
        manifest = _ADAPTER.validate_json(path.read_bytes(), strict=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the checkpoint was not finished, or lost files") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise CheckpointError(f"{path} is damaged: {describe(error)}") from error
    if manifest.version != VERSION:
        raise CheckpointError(f"{path} has format version {manifest.version}; this version reads {VERSION}")
    if manifest.checksum != _checksum(manifest):
        raise CheckpointError(f"{path} is damaged: its contents do not have the checksum that it states")
    for name in manifest.files:
        parts = PurePosixPath(name).parts
        if name != "/".join(parts) or ".." in parts or name.startswith("/") or not parts:
            raise CheckpointError(f"{path} names {name!r}, which is no file of the checkpoint")
    return manifest


def verify(folder: str | os.PathLike[str], mode: Verify = "full") -> Manifest:
    """Compare every file with the manifest, by size or (`full`) by sha256 too, at about 2 GB/s a core.

    Raises CheckpointError naming the first file that differs and how.
    """
    manifest = read_manifest(folder)
    files = [(Path(folder) / name, record) for name, record in manifest.files.items()]
    for path, record in files:
        _check_size(path, record.size)
    if mode == "full":
        with _threads() as pool:
            list(pool.map(lambda file: _check_hash(*file), files))
    return manifest


def _check_size(path: Path, expected: int) -> None:
    try:
        status = path.lstat()
    except OSError as error:
        raise CheckpointError(f"{path} is missing: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is no regular file")
    if status.st_size != expected:
        how = "truncated" if status.st_size < expected else "damaged"
        raise CheckpointError(f"{path} is {how}: {status.st_size} bytes instead of {expected}")


def _check_hash(path: Path, expected: FileRecord) -> None:
    try:
        found = _record(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if found.sha256 != expected.sha256:
        raise CheckpointError(
            f"{path} is damaged: sha256 {found.sha256[:16]}... instead of {expected.sha256[:16]}..."
        )


def _record(path: Path) -> FileRecord:
    with open(path, "rb") as file:
        return FileRecord(hashlib.file_digest(file, "sha256").hexdigest(), file.tell())


def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(16, os.cpu_count() or 1))  # hashing releases the GIL


def _regular_files(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if stat.S_ISREG(path.lstat().st_mode)
    )


def _hashed_by_writers(folder: Path, names: list[str]) -> dict[str, FileRecord]:
    known = {}
    for name in names:
        path = folder / name
        if path.name != METADATA_FILE:
            continue
        try:
            files = read_metadata(path.parent).files
        except CheckpointError:  # a plugin's own file of that name
            continue
        for file, record in files.items():
            place = path.with_name(file).relative_to(folder).as_posix()
            _check_size(folder / place, record.size)
            if place not in names:
                raise CheckpointError(f"{folder / place} is missing: {path} names it, its folder does not")
            known[place] = record
    return known


def _checksum(manifest: Manifest) -> str:
    content = asdict(manifest)
    del content["checksum"]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
