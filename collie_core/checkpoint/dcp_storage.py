"""DCP's storage interface over safetensors files and `metadata.json`, and its load planner with checks.

DCP's index of a chunk is (tensor name, offset); a plan lists the chunks that a rank writes, or the boxes
that it reads.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from collie_core.checkpoint.metadata import (
    Chunk,
    FileRecord,
    StoredTensor,
    StoreMetadata,
    chunk_key,
    write_metadata,
)
from collie_core.checkpoint.tensor_files import TensorFiles
from collie_core.errors import CheckpointError
from collie_core.safetensors_writer import DTYPE_NAMES, SafetensorsWriter


class SafetensorsStorageWriter(StorageWriter):
    """Writes each rank's plan to one file; the coordinator writes `metadata.json` last."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept between saves."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """The coordinator alone has plans of all ranks and results, and needs no other role."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any folder will do."""
        return True

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan without shards that are empty (a rank past the end of an unevenly cut tensor)."""
        items = []
        for item in plan.items:
            data, name = item.tensor_data, item.index.fqn
            if data is None:
                raise CheckpointError(
                    f"{self.folder}: {name!r} is no tensor; only tensors can be stored here"
                )
            if data.properties.dtype not in DTYPE_NAMES:
                raise CheckpointError(f"{self.folder}: {name!r}: {data.properties.dtype} cannot be stored")
            if 0 not in data.chunk.sizes or 0 in data.size:
                items.append(item)
        return replace(plan, items=items)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Give each rank its file."""
        return [replace(plan, storage_data=tensor_file(rank)) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file, if it has anything to write."""
        done: Future[list[WriteResult]] = Future()
        done.set_result(self._write_file(plan.storage_data, plan.items, planner) if plan.items else [])
        return done

    def _write_file(self, file: str, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        by_key: dict[str, WriteItem] = {}
        specs: dict[str, tuple[torch.Size, torch.dtype]] = {}
        for item in items:
            data = item.tensor_data
            assert data is not None  # prepare_local_plan refused the others
            key = chunk_key(item.index.fqn, data.size, data.chunk.offsets, data.chunk.sizes)
            by_key[key], specs[key] = item, (data.chunk.sizes, data.properties.dtype)
        with SafetensorsWriter(self.folder / file, specs) as writer:
            for key in writer.names:
                tensor = planner.resolve_data(by_key[key])
                assert isinstance(tensor, torch.Tensor)
                writer.write(key, tensor)
            record = FileRecord(*writer.close())
        return [WriteResult(item.index, record.size, (file, record)) for item in items]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write `metadata.json` out of the global plan and what every rank has written."""
        written: dict[MetadataIndex, tuple[str, FileRecord]] = {
            result.index: result.storage_data for rank in results for result in rank
        }
        tensors = {}
        for name, stored in metadata.state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata)
            chunks = []
            for chunk in stored.chunks:
                file, _ = written[MetadataIndex(name, chunk.offsets)]
                chunks.append(Chunk(file, tuple(chunk.offsets), tuple(chunk.sizes)))
            tensors[name] = StoredTensor(
                DTYPE_NAMES[stored.properties.dtype], tuple(stored.size), tuple(chunks)
            )
        files = dict(sorted(set(written.values()), key=lambda entry: entry[0]))
        write_metadata(self.folder, tensors, files)


class SafetensorsStorageReader(StorageReader):
    """Reads the boxes of a load plan out of a folder whose `metadata.json` was read and checked."""

    def __init__(self, folder: Path, metadata: StoreMetadata) -> None:
        self.folder = folder
        self.metadata = metadata

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept between loads."""

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Every rank reads for itself."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any folder will do."""
        return True

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata in DCP's own terms."""
        return Metadata({name: _dcp_tensor(stored) for name, stored in self.metadata.tensors.items()})

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy every box of the plan to its place, file by file."""
        files = TensorFiles(self.folder)
        for item in sorted(plan.items, key=lambda item: self._chunk(item).file):
            name = item.storage_index.fqn
            box = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))
            target = planner.resolve_tensor(item).detach()
            target.copy_(files.read(name, self.metadata.tensors[name], self._chunk(item), box))
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _chunk(self, item: ReadItem) -> Chunk:
        index = item.storage_index
        assert index.index is not None  # the planner gives each chunk's position
        return self.metadata.tensors[index.fqn].chunks[index.index]


class CheckedLoadPlanner(DefaultLoadPlanner):
    """DCP's planner, which finds and names every misfit before the first byte is copied."""

    def __init__(self, folder: Path, metadata: StoreMetadata, strict: bool) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.folder = folder
        self.stored = metadata.tensors
        self.strict = strict

    def create_local_plan(self) -> LoadPlan:
        """The boxes to read, or CheckpointError for tensors that are missing, mis-shaped or unexpected."""
        problems = []
        for name, tensor in self.state_dict.items():
            stored = self.stored.get(name)
            if stored is None:
                problems.append(f"{name} is missing")
            elif tuple(tensor.shape) != stored.shape or tensor.dtype != stored.torch_dtype:
                found = f"{list(stored.shape)} {stored.torch_dtype}"
                problems.append(f"{name} is {found}, expected {list(tensor.shape)} {tensor.dtype}")
        if self.strict:
            problems += [f"{name} is unexpected" for name in self.stored if name not in self.state_dict]
        if problems:
            more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
            raise CheckpointError(f"{self.folder} does not fit: {'; '.join(problems[:20])}{more}")
        plan: LoadPlan = super().create_local_plan()
        return plan


def tensor_file(rank: int) -> str:
    """The name of the file that a rank writes."""
    return f"tensors_{rank:05d}.safetensors"


def _dcp_tensor(stored: StoredTensor) -> TensorStorageMetadata:
    chunks = [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in stored.chunks]
    return TensorStorageMetadata(TensorProperties(stored.torch_dtype), torch.Size(stored.shape), chunks)
