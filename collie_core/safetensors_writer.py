"""Streams tensors into one safetensors file: no second copy of a tensor, sha256 computed on the way.

Format (https://huggingface.co/docs/safetensors): the length of the header (8 bytes, little endian), the
header (JSON, padded with spaces to a multiple of 8), then the bytes of the tensors without gaps.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch

if TYPE_CHECKING:
    from torch import Tensor

#: Names of the format for torch's dtypes.
DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
DTYPES: dict[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}

_CHUNK_BYTES = 4 * 2**20  # fits a cache: 1 GB is hashed and written in 0.57 s, with 16 MiB in 1.0 s
_INLINE_BYTES = 256 * 2**10  # smaller chunks are hashed at once: a hand-over costs about 30 us

TensorSpec = tuple[Sequence[int], torch.dtype]


class SafetensorsWriter:
    """Writes the tensors of `specs` (name -> (shape, dtype)) to the file `path`.

    The header is written first, then each tensor by `write`, on any device and with any strides; the extra
    host memory is one chunk of 4 MiB.  Tensors lie in the order of `specs` where every offset is then a
    multiple of the element size, else in descending element size (`names` says which).  Written in that
    order the file is hashed on the way by a second thread; in another order it is read again by `close`.

    As a context manager it removes the file if the body raises, and else closes it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        specs: Mapping[str, TensorSpec],
        metadata: Mapping[str, str] | None = None,
        digest: bool = True,
    ) -> None:
        """Create the file and write its header; `metadata` defaults to {"format": "pt"}.

        digest: compute the sha256, which is most of the time where the disk is fast.
        Raises TypeError for a dtype that the format does not have, OSError where the file cannot be written.
        """
        self.path = Path(path)
        self._specs = {name: (tuple(shape), dtype) for name, (shape, dtype) in specs.items()}
        self.names = _file_order(self._specs)
        header = _header(self._specs, self.names, {"format": "pt"} if metadata is None else metadata)
        self._offsets: dict[str, int] = {}
        self._size = len(header)
        for name in self.names:
            self._offsets[name] = self._size
            self._size += _num_bytes(self._specs[name])
        self._pending = set(self.names)
        self._hash = hashlib.sha256(header)
        self._digest = digest
        self._hashed = len(header)  # everything before this offset is in the hash
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="sha256")
        self._file = open(self.path, "wb+")  # noqa: SIM115  # closed by close or abort
        try:
            self._file.write(header)
        except OSError:
            self.abort()
            raise

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor; its shape and dtype must be those of the spec.

        Raises ValueError for a tensor that is not in the specs, was written before or differs from its spec.
        """
        if name not in self._pending:
            raise ValueError(f"{self.path}: tensor {name!r} is not expected, or was written before")
        shape, dtype = self._specs[name]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            found = f"{tuple(tensor.shape)} {tensor.dtype}"
            raise ValueError(f"{self.path}: tensor {name!r} is {found}, announced as {shape} {dtype}")
        offset = self._offsets[name]
        in_order = offset == self._hashed
        if self._file.tell() != offset:
            self._file.seek(offset)
        for chunk in _byte_chunks(tensor.detach()):
            self._write_chunk(chunk.numpy().data, in_order)
        self._pending.remove(name)

    def close(self) -> tuple[str, int]:
        """Flush the file to the disk; returns (sha256 in hexadecimal, size in bytes).

        The sha256 is "" without `digest`.  Raises ValueError if a tensor was not written.
        """
        if self._pending:
            raise ValueError(f"{self.path}: tensors never written: {', '.join(sorted(self._pending))}")
        self._hasher.shutdown()
        self._file.flush()
        if self._digest and self._hashed < self._size:
            self._hash_rest()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._hash.hexdigest() if self._digest else "", self._size

    def abort(self) -> None:
        """Close and remove the unfinished file."""
        self._hasher.shutdown()
        with suppress(OSError):
            self._file.close()  # flushes, which fails on a full disk
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.abort()
        elif not self._file.closed:
            self.close()

    def _write_chunk(self, chunk: memoryview, in_order: bool) -> None:
        if not in_order or not self._digest:
            self._file.write(chunk)
            return
        if len(chunk) < _INLINE_BYTES:
            self._hash.update(chunk)
            self._file.write(chunk)
        else:
            hashing = self._hasher.submit(self._hash.update, chunk)
            self._file.write(chunk)
            hashing.result()
        self._hashed += len(chunk)

    def _hash_rest(self) -> None:
        self._file.seek(self._hashed)
        while chunk := self._file.read(_CHUNK_BYTES):
            self._hash.update(chunk)


def _num_bytes(spec: TensorSpec) -> int:
    shape, dtype = spec
    return math.prod(shape) * dtype.itemsize


def _file_order(specs: Mapping[str, TensorSpec]) -> list[str]:
    """Names in the order in which they lie in the file, each at a multiple of its element size."""
    offset = 0
    for spec in specs.values():
        if offset % spec[1].itemsize:
            return sorted(specs, key=lambda name: -specs[name][1].itemsize)
        offset += _num_bytes(spec)
    return list(specs)


def _header(specs: Mapping[str, TensorSpec], names: list[str], metadata: Mapping[str, str]) -> bytes:
    """The bytes before the first tensor."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name in names:
        shape, dtype = specs[name]
        if dtype not in DTYPE_NAMES:
            raise TypeError(f"tensor {name!r}: safetensors has no dtype for {dtype}")
        end = offset + _num_bytes(specs[name])
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _byte_chunks(tensor: Tensor) -> Iterator[Tensor]:
    """The bytes of `tensor` in row-major order, as 1-D uint8 host tensors of at most a chunk.

    A tensor that is not contiguous is made so a few rows at a time.
    """
    tensor = tensor.resolve_conj().resolve_neg()
    if tensor.numel() == 0:
        return
    if tensor.is_contiguous():
        for part in tensor.reshape(-1).view(torch.uint8).split(_CHUNK_BYTES):
            yield part.cpu()
        return
    row_bytes = _num_bytes((tensor.shape[1:], tensor.dtype))
    if row_bytes > _CHUNK_BYTES:
        for row in tensor:
            yield from _byte_chunks(row)
        return
    for rows in tensor.split(_CHUNK_BYTES // row_bytes):
        yield rows.contiguous().reshape(-1).view(torch.uint8).cpu()
