"""Tensors in a folder: one safetensors file a rank and `metadata.json`; nothing is ever pickled.

Planning is that of torch.distributed.checkpoint (DCP): each rank writes what only it holds, replicas are
written once, and a load reads where stored chunks and local ones overlap, so that a folder written under
one layout is read under any other.  DCP's own storage pickles its metadata and every entry that is no
tensor; this one cannot hold such an entry.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from collie_core.checkpoint.dcp_storage import (
    CheckedLoadPlanner,
    SafetensorsStorageReader,
    SafetensorsStorageWriter,
)
from collie_core.checkpoint.metadata import read_metadata
from collie_core.checkpoint.tensor_files import TensorFiles
from collie_core.errors import CheckpointError, CollieError, nearest

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

__all__ = ["host_copy", "load_tensors", "read_metadata", "save_tensors", "stream_tensors"]


def save_tensors(
    state: Mapping[str, Tensor],
    folder: str | os.PathLike[str],
    *,
    process_group: ProcessGroup | None = None,
) -> None:
    """Write `state` (flat names; tensors of any device and strides, DTensors) into `folder`, made if missing.

    Collective over `process_group` (default: all ranks, where torch.distributed is initialised); ranks may
    hold different names.  The extra host memory is one chunk of a few MiB.

    Raises CheckpointError for an entry that is no tensor or of a dtype that cannot be stored, OSError where
    the disk fails; on every rank if on any.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    writer = SafetensorsStorageWriter(folder)
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    if _is_distributed():
        try:
            save(dict(state), storage_writer=writer, planner=planner, process_group=process_group)
        except CheckpointException as error:
            _raise_cause(error, f"{folder} could not be written")
        return
    planner.set_up_planner(dict(state), is_coordinator=True)
    plan = writer.prepare_local_plan(planner.create_local_plan())
    plans, metadata = planner.create_global_plan([plan])
    [plan] = writer.prepare_global_plan(plans)
    writer.finish(metadata, [writer.write_data(planner.finish_plan(plan), planner).value()])


def load_tensors(
    state: dict[str, Tensor],
    folder: str | os.PathLike[str],
    *,
    strict: bool = False,
    process_group: ProcessGroup | None = None,
) -> None:
    """Fill the tensors of `state` in place from a folder written by `save_tensors` under any layout.

    Each rank reads the part of each tensor that it holds.  `strict` also refuses stored tensors that
    `state` lacks (for a rank that holds every name).  Collective like `save_tensors`.

    Raises CheckpointError, before anything is changed, naming the tensors that are missing or differ in
    shape or dtype; on every rank if on any.
    """
    metadata = read_metadata(folder)
    reader = SafetensorsStorageReader(Path(folder), metadata)
    planner = CheckedLoadPlanner(Path(folder), metadata, strict)
    if _is_distributed():
        try:
            load(state, storage_reader=reader, planner=planner, process_group=process_group)
        except CheckpointException as error:
            _raise_cause(error, f"{folder} could not be read")
        return
    planner.set_up_planner(state, reader.read_metadata(), is_coordinator=True)
    reader.read_data(planner.finish_plan(planner.create_local_plan()), planner)


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
        for chunk in stored.chunks:
            box = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
            whole[box].copy_(files.read(name, stored, chunk))
        yield name, whole


def host_copy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy in host memory, shards remaining shards, for a save in the background of training."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _raise_cause(error: CheckpointException, what: str) -> NoReturn:
    """Raise what the first failing rank raised: DCP wraps it into a BaseException, which goes past
    `except Exception`."""
    rank, (cause, _) = min(error.failures.items())
    if isinstance(cause, CollieError | OSError | KeyboardInterrupt | SystemExit):
        raise cause from None
    raise CheckpointError(f"{what}: rank {rank}: {type(cause).__name__}: {cause}") from error
