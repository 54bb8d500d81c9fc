"""Weight files of a folder in Hugging Face layout: read tensor by tensor, written as they come.

Reading copies: pages of a mapped file would count as resident memory beside the tensors made from them.
`mapped` gives tensors that are the file's pages.  Nothing is unpickled but by torch.load(weights_only=True).
"""

from __future__ import annotations

import json
import math
import os
import threading
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from collie_core.errors import CheckpointError
from collie_core.files import fsync_dir, write_json_atomic
from collie_core.safetensors_writer import DTYPES, SafetensorsWriter, TensorSpec

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"

_CHUNK_BYTES = 2 * 2**20  # fits a cache
_MAPPED_BYTES = 64 * 2**20  # of a .bin, before it is mapped anew
_MAX_HEADER_BYTES = 100 * 2**20  # as in the safetensors library


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `offset` bytes into `file`; -1 in a .bin."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int = -1


class WeightReader:
    """The tensors of a model folder, by their names in the checkpoint.

    Reads `model.safetensors` or its shards, else `pytorch_model.bin` or its shards.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Read the headers.  Raises CheckpointError naming a file that is missing, damaged or unsafe."""
        self.folder = Path(folder)
        self._bin: tuple[Path, dict[str, Tensor]] | None = None
        self._bin_bytes = 0
        self._bin_lock = threading.Lock()
        self._maps: dict[Path, torch.UntypedStorage] = {}
        self._stored: dict[str, StoredTensor] = {}
        expected: dict[str, str] = {}
        for path in self._files(expected):
            found = _safetensors_header(path) if path.suffix == ".safetensors" else self._bin_header(path)
            for name in found.keys() & self._stored.keys():
                raise CheckpointError(f"{path}: tensor {name!r} is in {self._stored[name].file.name} too")
            self._stored |= found
        for name, file in expected.items():
            if name not in self._stored or self._stored[name].file.name != file:
                raise CheckpointError(
                    f"{self.folder / file}: lacks tensor {name!r}, which the index says it has"
                )

    def keys(self) -> list[str]:
        """Names, in the order in which the tensors lie in the files."""
        return list(self._stored)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._stored[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a tensor."""
        return self._stored[name].dtype

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._stored[name].file

    def get(self, name: str) -> Tensor:
        """The tensor on the CPU in its stored dtype.  From a .bin it may share memory with the file."""
        stored = self._stored[name]
        if stored.offset < 0:
            return self._from_bin(name)
        out = torch.empty(stored.shape, dtype=stored.dtype)
        self.read_into(name, out)
        return out

    def read_into(self, name: str, out: Tensor) -> None:
        """Read a tensor into `out` (same shape; any dtype, device and strides), casting on the way."""
        stored = self._stored[name]
        if stored.offset < 0:
            out.copy_(self._from_bin(name))
            return
        with open(stored.file, "rb", buffering=0) as file:
            if out.device.type == "cpu" and out.dtype == stored.dtype and out.is_contiguous():
                _read_exactly(file.fileno(), stored, 0, out)
                return
            flat = (
                out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
            )
            elements = flat.view(-1)
            chunk = torch.empty(
                min(elements.numel(), _CHUNK_BYTES // stored.dtype.itemsize), dtype=stored.dtype
            )
            for start in range(0, elements.numel(), max(1, chunk.numel())):
                part = chunk[: elements.numel() - start]
                _read_exactly(file.fileno(), stored, start, part)
                elements[start : start + part.numel()].copy_(part)
            if flat is not out:
                out.copy_(flat)

    def read_box(self, name: str, box: tuple[slice, ...], out: Tensor) -> None:
        """Read a box of the tensor (start and stop in every dimension) into `out`, casting on the way.

        No other rows are read, and of their columns a few MiB at a time.
        """
        stored = self._stored[name]
        if stored.offset < 0:
            out.copy_(self._from_bin(name)[box])
            return
        if not box:
            self.read_into(name, out)
            return
        width = math.prod(stored.shape[1:])
        height = max(1, _CHUNK_BYTES // max(1, width * stored.dtype.itemsize))
        with open(stored.file, "rb", buffering=0) as file:
            for row in range(box[0].start, box[0].stop, height):
                count = min(height, box[0].stop - row)
                rows = torch.empty((count, *stored.shape[1:]), dtype=stored.dtype)
                _read_exactly(file.fileno(), stored, row * width, rows)
                begin = row - box[0].start
                out[begin : begin + count].copy_(rows[(slice(None), *box[1:])])

    def mapped(self, name: str) -> Tensor | None:
        """The tensor as pages of its file, read when they are used; writing to it changes a private copy.

        None where that cannot be: in a .bin, whose tensors may share memory, and at odd places of a file.
        The tensor must not outlive the file's contents: replacing the file is safe, writing into it is not.
        """
        stored = self._stored[name]
        size = math.prod(stored.shape) * stored.dtype.itemsize
        if stored.offset < 0 or stored.offset % stored.dtype.itemsize or size == 0:
            return None
        if stored.file not in self._maps:
            length = stored.file.stat().st_size
            self._maps[stored.file] = cast(
                torch.UntypedStorage, torch.UntypedStorage.from_file(str(stored.file), False, length)
            )
        pages = self._maps[stored.file][stored.offset : stored.offset + size]
        return torch.asarray(pages, dtype=torch.uint8).view(stored.dtype).view(stored.shape)

    def _files(self, expected: dict[str, str]) -> list[Path]:
        """The weight files; of shards, `expected` is filled with tensor name -> file name."""
        for single, index in ((SAFETENSORS, SAFETENSORS_INDEX), (BIN, BIN_INDEX)):
            if (self.folder / single).is_file():
                return [self.folder / single]
            if (self.folder / index).is_file():
                expected.update(_read_index(self.folder / index))
                return [self.folder / file for file in sorted(set(expected.values()))]
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder}: no such folder")
        names = ", ".join(sorted(path.name for path in self.folder.iterdir())[:20]) or "nothing"
        raise CheckpointError(
            f"{self.folder}: no weights; expected {SAFETENSORS}, {SAFETENSORS_INDEX}, {BIN} or {BIN_INDEX}, "
            f"found {names}"
        )

    def _bin_header(self, path: Path) -> dict[str, StoredTensor]:
        tensors = _load_bin(path)
        self._bin, self._bin_bytes = (path, tensors), 0
        return {name: StoredTensor(path, tuple(t.shape), t.dtype) for name, t in tensors.items()}

    def _from_bin(self, name: str) -> Tensor:
        path = self._stored[name].file
        with self._bin_lock:
            if self._bin is None or self._bin[0] != path or self._bin_bytes > _MAPPED_BYTES:
                self._bin = None  # before the next is mapped
                self._bin, self._bin_bytes = (path, _load_bin(path)), 0
            tensor = self._bin[1][name]
            self._bin_bytes += tensor.numel() * tensor.element_size()
        return tensor


def _read_exactly(descriptor: int, stored: StoredTensor, start: int, out: Tensor) -> None:
    """Fill the contiguous CPU tensor `out` with the elements from `start` on."""
    if out.numel() == 0:
        return
    view = out.reshape(-1).view(torch.uint8).numpy().data
    position = stored.offset + start * stored.dtype.itemsize
    while view:
        count = os.preadv(descriptor, [view], position)
        if count == 0:
            raise CheckpointError(f"{stored.file}: ended while it was read; it was changed or cut")
        view, position = view[count:], position + count


def _safetensors_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file, in file order.  Raises CheckpointError for a damaged one."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{path}: damaged, or no safetensors file: its header does not fit into it"
                )
            content = json.loads(file.read(length))
        entries = {
            name: _entry(path, value, 8 + length) for name, value in content.items() if name != "__metadata__"
        }
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: its header is damaged: {error!r}") from None
    end = 8 + length
    ordered = sorted(entries.items(), key=lambda item: (item[1].offset, math.prod(item[1].shape)))
    for name, stored in ordered:
        if stored.offset != end:
            raise CheckpointError(f"{path}: its header is damaged: tensor {name!r} begins at a wrong place")
        end += math.prod(stored.shape) * stored.dtype.itemsize
    if end != size:
        kind = "truncated" if size < end else "damaged"
        raise CheckpointError(f"{path}: {kind}: it has {size:,} bytes, its header says {end:,}")
    return dict(ordered)


def _entry(path: Path, value: dict[str, Any], data: int) -> StoredTensor:
    shape, (start, end) = tuple(value["shape"]), value["data_offsets"]
    stored = StoredTensor(path, shape, DTYPES[value["dtype"]], data + start)
    if min(shape, default=0) < 0 or start < 0 or end - start != math.prod(shape) * stored.dtype.itemsize:
        raise ValueError(f"{value} contradicts itself")
    return stored


def _load_bin(path: Path) -> dict[str, Tensor]:
    """The mapping in a file of `torch.save`, mapped into memory where its format allows."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file, but the index names it") from None
    except Exception as error:  # the unpickler raises whatever a damaged file makes it raise
        cause = str(error).strip().replace("\n", " ")
        refused = "Unsupported" in cause or "weights_only" in cause.lower() or "Weights only" in cause
        what = "holds more than tensors, which could run code, and is refused" if refused else "is damaged"
        detail = cause.split("GLOBAL ")[-1].split(" was not")[0] if "GLOBAL " in cause else cause[:200]
        raise CheckpointError(f"{path}: {what} ({detail})") from None
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path}: expected a mapping from names to tensors alone")
    return dict(content)


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        pairs = dict(weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged index: {error!r}") from None
    for file in set(pairs.values()):
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{path}: names {file!r}, which is no file of this folder")
        if not (path.parent / file).is_file():
            raise CheckpointError(f"{path.parent / file}: no such file, but {path.name} names it")
    return pairs


def write_safetensors_sharded(
    folder: Path,
    items: Iterable[tuple[str, Tensor]],
    specs: Mapping[str, TensorSpec],
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write tensors as they come into `model.safetensors`, or into shards and their index.

    specs: name -> (shape, dtype) of everything in `items`, best in the same order; it decides the shards.
    The index, or the single file, appears last.  Raises ValueError where `items` and `specs` disagree.
    """
    shards = _plan_shards(specs, max_shard_bytes)
    single = len(shards) <= 1
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if single:
        names = [SAFETENSORS]
    shard_of = {name: number for number, shard in enumerate(shards) for name in shard}
    writers: dict[int, SafetensorsWriter] = {}
    left = [len(shard) for shard in shards]
    try:
        if not shards:
            writers[0], left = SafetensorsWriter(folder / names[0], {}), [0]
        for name, tensor in items:
            number = shard_of[name]
            if number not in writers:
                shard = {key: specs[key] for key in shards[number]}
                writers[number] = SafetensorsWriter(folder / names[number], shard, digest=False)
            writers[number].write(name, tensor)
            left[number] -= 1
            if left[number] == 0:
                writers.pop(number).close()
        for number in list(writers):
            writers.pop(number).close()
    except BaseException:
        for writer in writers.values():
            writer.abort()
        raise
    if sum(left):
        raise ValueError(f"{sum(left)} tensors of the specs were never written")
    if not single:
        total = sum(math.prod(shape) * dtype.itemsize for shape, dtype in specs.values())
        weight_map = {name: names[shard_of[name]] for name in specs}
        write_json_atomic(
            folder / SAFETENSORS_INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    fsync_dir(folder)


def _plan_shards(specs: Mapping[str, TensorSpec], max_shard_bytes: int) -> list[list[str]]:
    """Names of each shard, in order, none above the limit but for a single tensor that is."""
    shards: list[list[str]] = []
    filled = 0
    for name, (shape, dtype) in specs.items():
        size = math.prod(shape) * dtype.itemsize
        if not shards or filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
