"""`metadata.json` of a folder of tensors: which piece of which tensor lies in which file.

    {"format": "collie-tensors", "version": 1,
     "tensors": {"embed.weight": {"dtype": "BF16", "shape": [251, 64], "chunks": [
         {"file": "tensors_00000.safetensors", "offsets": [0, 0], "sizes": [126, 64]},
         {"file": "tensors_00001.safetensors", "offsets": [126, 0], "sizes": [125, 64]}]}},
     "files": {"tensors_00000.safetensors": {"sha256": "...", "size": 16216}, ...}}

The chunks of a tensor cover it exactly.  A folder may come from anywhere, so nothing in it is believed
before it is checked.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, TypeAdapter, ValidationError

from collie_core.errors import CheckpointError
from collie_core.files import write_text_atomic
from collie_core.safetensors_writer import DTYPES

METADATA_FILE = "metadata.json"
VERSION = 1

Index = tuple[Annotated[int, Field(ge=0, lt=2**63)], ...]
_TENSOR_FILE = re.compile(r"tensors_\d{5,}\.safetensors")


@dataclass(frozen=True)
class FileRecord:
    """What a file holds: sha256 (hexadecimal) and size in bytes."""

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    size: Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, `sizes` elements from `offsets` on, and the file that holds it."""

    file: str
    offsets: Index
    sizes: Index


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in the store: dtype (safetensors' name), global shape, and the chunks that cover it."""

    dtype: str
    shape: Index
    chunks: tuple[Chunk, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch knows it."""
        return DTYPES[self.dtype]

    def key(self, name: str, chunk: Chunk) -> str:
        """The chunk's name in its file: `w` for a whole tensor, else with its offsets, `w@126,0`."""
        return chunk_key(name, self.shape, chunk.offsets, chunk.sizes)


@dataclass(frozen=True)
class StoreMetadata:
    """The contents of a folder of tensors."""

    format: Literal["collie-tensors"]
    version: int
    tensors: dict[str, StoredTensor]
    files: dict[str, FileRecord]


_ADAPTER = TypeAdapter(StoreMetadata)


def chunk_key(name: str, shape: Iterable[int], offsets: Iterable[int], sizes: Iterable[int]) -> str:
    """See StoredTensor.key."""
    return name if tuple(sizes) == tuple(shape) else f"{name}@{','.join(map(str, offsets))}"


def write_metadata(folder: Path, tensors: dict[str, StoredTensor], files: dict[str, FileRecord]) -> None:
    """Write `metadata.json`."""
    metadata = StoreMetadata("collie-tensors", VERSION, tensors, files)
    write_text_atomic(folder / METADATA_FILE, _ADAPTER.dump_json(metadata).decode() + "\n")


def read_metadata(folder: str | os.PathLike[str]) -> StoreMetadata:
    """Read and check `metadata.json` of a folder written by `save_tensors`.

    Raises CheckpointError, naming file and entry, if it is missing, malformed, of another version, names a
    file outside the folder, or describes chunks that do not cover their tensor exactly.
    """
    path = Path(folder) / METADATA_FILE
    try:
        metadata = _ADAPTER.validate_json(path.read_bytes(), strict=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise CheckpointError(f"{path}: {describe(error)}") from error
    if metadata.version != VERSION:
        raise CheckpointError(f"{path} has format version {metadata.version}; this version reads {VERSION}")
    for name, tensor in metadata.tensors.items():
        problem = _problem(tensor, metadata.files)
        if problem:
            raise CheckpointError(f"{path}: tensor {name!r}: {problem}")
    return metadata


def describe(error: ValidationError) -> str:
    """The first problem of a pydantic error on one line, with its place."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}" if place else first["msg"]


def _problem(tensor: StoredTensor, files: dict[str, FileRecord]) -> str | None:
    if tensor.dtype not in DTYPES:
        return f"unknown dtype {tensor.dtype!r}"
    volume = 0
    for chunk in tensor.chunks:
        if not _TENSOR_FILE.fullmatch(chunk.file) or chunk.file not in files:
            return f"{chunk.file!r} is not a tensor file of this folder"
        if not len(chunk.offsets) == len(chunk.sizes) == len(tensor.shape):
            return f"a chunk at {list(chunk.offsets)} has another number of dimensions"
        if any(o + s > n for o, s, n in zip(chunk.offsets, chunk.sizes, tensor.shape, strict=True)):
            return f"chunk {list(chunk.offsets)} + {list(chunk.sizes)} exceeds shape {list(tensor.shape)}"
        volume += math.prod(chunk.sizes)
    if volume != math.prod(tensor.shape) or not tensor.chunks or _overlap(tensor):
        return f"its {len(tensor.chunks)} chunks do not cover shape {list(tensor.shape)} exactly"
    return None


def _overlap(tensor: StoredTensor) -> bool:
    """Whether two chunks share an element: a sweep along the dimension that the chunks cut most finely."""
    if len(tensor.chunks) < 2:
        return False
    if not tensor.shape:
        return True
    axis = max(range(len(tensor.shape)), key=lambda dim: len({chunk.offsets[dim] for chunk in tensor.chunks}))
    active: list[Chunk] = []
    for chunk in sorted(tensor.chunks, key=lambda chunk: chunk.offsets[axis]):
        active = [other for other in active if other.offsets[axis] + other.sizes[axis] > chunk.offsets[axis]]
        if any(_share(chunk, other) for other in active):
            return True
        active.append(chunk)
    return False


def _share(a: Chunk, b: Chunk) -> bool:
    return all(
        max(o, p) < min(o + s, p + t)
        for o, s, p, t in zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)
    )
