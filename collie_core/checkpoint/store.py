"""Tensors in a folder: one safetensors file a rank and `metadata.json`; nothing is ever pickled into it.

Every rank gives the pieces that it holds, boxes of whole tensors; equal boxes are written once, and a load
reads where stored boxes and local ones overlap.  So a folder written under one layout is read under any.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from collie_core.checkpoint.metadata import (
    Chunk,
    FileRecord,
    StoredTensor,
    chunk_key,
    read_metadata,
    write_metadata,
)
from collie_core.checkpoint.tensor_files import TensorFiles
from collie_core.errors import CheckpointError, nearest
from collie_core.safetensors_writer import DTYPE_NAMES, SafetensorsWriter
from collie_core.shard import Piece
from collie_core.together import distributed, gather, together

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["TensorSave", "load_tensors", "read_metadata", "save_tensors", "stream_tensors"]

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and sizes


class TensorSave:
    """A save in three parts, so that the middle one can go on beside training.

    Made and finished by all ranks together; `group` (default: all ranks) must be used by nobody else from
    one to the other.  Raises CheckpointError for an entry that is no tensor or of a dtype that cannot be
    stored, on every rank if on any.
    """

    def __init__(
        self, state: Mapping[str, Tensor | Piece], group: ProcessGroup | None = None, copy: bool = False
    ) -> None:
        """state: flat names; tensors of any device and strides, pieces.  copy: what is to be
        written is copied into host memory, so that training may go on."""
        self._group = group
        pieces = together(lambda: {name: _piece(name, value) for name, value in state.items()}, group)
        specs = {name: (p.local.dtype, p.shape, _box(p)) for name, p in pieces.items()}
        everyone = gather(specs, group)
        rank = dist.get_rank(group) if distributed() else 0
        self._tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self._boxes: dict[str, dict[Box, int]] = {}  # which rank writes which box
        for name in dict.fromkeys(name for one in everyone for name in one):
            holders: dict[Box, list[int]] = {}
            for number, one in enumerate(everyone):
                if name in one and (0 not in one[name][2][1] or 0 in one[name][1]):
                    self._tensors[name] = one[name][:2]
                    holders.setdefault(one[name][2], []).append(number)
            # replicas take turns, so that no rank writes everything that all ranks have
            turn = zlib.crc32(name.encode())
            self._boxes[name] = {box: ranks[turn % len(ranks)] for box, ranks in holders.items()}
        mine = {
            name: piece
            for name, piece in pieces.items()
            if name in self._boxes and self._boxes[name].get(_box(piece)) == rank
        }
        self._mine = {
            chunk_key(name, piece.shape, piece.offsets, piece.local.shape): (
                piece.local.detach().to("cpu", copy=True) if copy else piece.local.detach()
            )
            for name, piece in mine.items()
        }
        self._file = f"tensors_{rank:05d}.safetensors"
        self._first = rank == 0

    def write(self, folder: Path) -> FileRecord | None:
        """Write this rank's file; no other rank is asked.  Raises OSError where the disk fails."""
        if not self._mine:
            return None
        specs = {key: (local.shape, local.dtype) for key, local in self._mine.items()}
        with SafetensorsWriter(folder / self._file, specs) as writer:
            for key in writer.names:
                writer.write(key, self._mine[key])
            return FileRecord(*writer.close())

    def finish(self, folder: Path, write: Callable[[], FileRecord | None]) -> None:
        """Call `write`, and when every rank has written its file, write `metadata.json` (rank 0).

        Raises what the first failing rank raised, on every rank.
        """
        records = gather(together(write, self._group), self._group)
        self._mine = {}
        if not self._first:
            return
        tensors = {}
        for name, (dtype, shape) in self._tensors.items():
            chunks = tuple(
                Chunk(f"tensors_{rank:05d}.safetensors", offsets, sizes)
                for (offsets, sizes), rank in sorted(self._boxes[name].items())
            )
            tensors[name] = StoredTensor(DTYPE_NAMES[dtype], shape, chunks)
        files = {
            f"tensors_{rank:05d}.safetensors": record
            for rank, record in enumerate(records)
            if record is not None
        }
        write_metadata(folder, tensors, files)


def save_tensors(
    state: Mapping[str, Tensor | Piece],
    folder: str | os.PathLike[str],
    *,
    process_group: ProcessGroup | None = None,
) -> None:
    """Write `state` into `folder`, made if missing; see `TensorSave`.

    Collective over `process_group` (default: all ranks, where torch.distributed is initialised); ranks may
    hold different names.  The extra host memory is one chunk of a few MiB.
    Raises CheckpointError and OSError as `TensorSave` does.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    saving = TensorSave(state, process_group)
    saving.finish(folder, lambda: saving.write(folder))


def load_tensors(
    state: Mapping[str, Tensor | Piece],
    folder: str | os.PathLike[str],
    *,
    process_group: ProcessGroup | None = None,
) -> None:
    """Fill the tensors of `state` in place from a folder written by `save_tensors` under any layout.

    Each rank reads the part of each tensor that it holds.  Collective like `save_tensors`.

    Raises CheckpointError, before anything is changed, naming the tensors that are missing or differ in
    shape or dtype; on every rank if on any.
    """
    folder = Path(folder)

    def check() -> tuple[dict[str, StoredTensor], dict[str, Piece]]:
        stored = read_metadata(folder).tensors
        pieces = {name: _piece(name, value) for name, value in state.items()}
        _refuse_misfits(folder, stored, pieces)
        return stored, pieces

    stored, pieces = together(check, process_group)
    files = TensorFiles(folder)
    for name, piece in pieces.items():
        fill(piece, name, stored[name], files)


def fill(piece: Piece, name: str, stored: StoredTensor, files: TensorFiles) -> None:
    """Copy into the piece where stored chunks overlap it."""
    for chunk in stored.chunks:
        begin = [max(a, b) for a, b in zip(piece.offsets, chunk.offsets, strict=True)]
        end = [
            min(a + n, b + m)
            for a, n, b, m in zip(piece.offsets, piece.local.shape, chunk.offsets, chunk.sizes, strict=True)
        ]
        if any(b >= e for b, e in zip(begin, end, strict=True)):
            continue
        target = tuple(slice(b - o, e - o) for b, e, o in zip(begin, end, piece.offsets, strict=True))
        source = tuple(slice(b - o, e - o) for b, e, o in zip(begin, end, chunk.offsets, strict=True))
        piece.local.detach()[target].copy_(files.read(name, stored, chunk, source))


def stream_tensors(
    folder: str | os.PathLike[str], names: Sequence[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor on the host) of each of `names` (default: all), one at a time; no process group.

    A tensor may share memory with the mapping of its file: copy it before you keep it.
    Raises CheckpointError for an unknown name or a damaged folder.
    """
    metadata = read_metadata(folder)
    files = TensorFiles(Path(folder))
    for name in metadata.tensors if names is None else names:
        if name not in metadata.tensors:
            raise CheckpointError(f"{folder} holds no tensor {name!r}{nearest(name, metadata.tensors)}")
        stored = metadata.tensors[name]
        if len(stored.chunks) == 1:
            yield name, files.read(name, stored, stored.chunks[0])
            continue
        whole = torch.empty(stored.shape, dtype=stored.torch_dtype)
        fill(Piece.of(whole), name, stored, files)
        yield name, whole


def _piece(name: str, value: Any) -> Piece:
    """What a rank holds of a tensor.  Raises CheckpointError for what cannot be stored."""
    if not isinstance(value, Piece | Tensor):
        raise CheckpointError(f"{name!r} is no tensor; only tensors can be stored")
    piece = Piece.of(value)
    if piece.local.dtype not in DTYPE_NAMES:
        raise CheckpointError(f"{name!r}: {piece.local.dtype} cannot be stored")
    return piece


def _box(piece: Piece) -> Box:
    return tuple(piece.offsets), tuple(piece.local.shape)


def _refuse_misfits(
    folder: Path, stored: Mapping[str, StoredTensor], pieces: Mapping[str, Piece]
) -> None:
    problems = []
    for name, piece in pieces.items():
        found = stored.get(name)
        if found is None:
            problems.append(f"{name} is missing")
        elif piece.shape != found.shape or piece.local.dtype != found.torch_dtype:
            has = f"{list(found.shape)} {found.torch_dtype}"
            problems.append(f"{name} is {has}, expected {list(piece.shape)} {piece.local.dtype}")
    if problems:
        more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise CheckpointError(f"{folder} does not fit: {'; '.join(problems[:20])}{more}")
