"""What a user may name as a model: a Hugging Face folder, a hub id, a run's folder or a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from collie_core.checkpoint.folder import (
    CHECKPOINTS,
    is_checkpoint,
    open_checkpoint,
    read_state,
    step_folders,
)
from collie_core.checkpoint.manifest import Verify
from collie_core.checkpoint.store import fill, read_metadata, stream_tensors
from collie_core.checkpoint.tensor_files import TensorFiles
from collie_core.errors import CheckpointError
from collie_core.models.adapter_folder import ADAPTER_FILE, AdapterSpec, adapter_folders, read_adapters
from collie_core.models.hub import resolve
from collie_core.models.loading import Slots, load_weights, match_weights
from collie_core.models.weight_files import WeightReader
from collie_core.models.weight_map import Ignore, Rename, WeightRule
from collie_core.ops import select_ops
from collie_core.shard import Piece

if TYPE_CHECKING:
    from collie_core.models.provider import SelectedProvider

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelSource:
    """folder: config.json and tokenizer.  checkpoint: where the weights are, or None: in `folder`.

    adapters: what the model was adapted by.  trained: the checkpoint of a run with their parameters, or
    None: in their own folders.
    """

    folder: Path
    checkpoint: Path | None = None
    adapters: tuple[AdapterSpec, ...] = ()
    trained: Path | None = None


class Reader(Protocol):
    """What weights are loaded from: tensors by name, one at a time."""

    folder: Path

    def keys(self) -> list[str]: ...
    def __iter__(self) -> Iterator[str]: ...
    def __contains__(self, name: object) -> bool: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def file(self, name: str) -> Path: ...
    def get(self, name: str) -> Tensor: ...
    def read_into(self, name: str, out: Tensor) -> None: ...
    def read_box(self, name: str, box: tuple[slice, ...], out: Tensor) -> None: ...
    def mapped(self, name: str) -> Tensor | None: ...


class CheckpointReader:
    """A checkpoint's tensors behind the interface of `WeightReader`; names are `model.<parameter>`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stored = read_metadata(folder).tensors
        self._files = TensorFiles(folder)

    def keys(self) -> list[str]:
        """Names of all tensors."""
        return list(self._stored)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return tuple(self._stored[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype."""
        return self._stored[name].torch_dtype

    def file(self, name: str) -> Path:
        """The checkpoint's folder: a tensor may lie in several of its files."""
        return self.folder

    def get(self, name: str) -> Tensor:
        """The whole tensor on the CPU."""
        stored = self._stored[name]
        whole = torch.empty(stored.shape, dtype=stored.torch_dtype)
        fill(Piece.of(whole), name, stored, self._files)
        return whole

    def read_into(self, name: str, out: Tensor) -> None:
        """Copy the tensor into `out`."""
        out.copy_(self.get(name))

    def read_box(self, name: str, box: tuple[slice, ...], out: Tensor) -> None:
        """Copy a box of the tensor into `out`, casting on the way."""
        stored = self._stored[name]
        values = torch.empty(out.shape, dtype=stored.torch_dtype)
        piece = Piece(values, tuple(stored.shape), tuple(part.start for part in box))
        fill(piece, name, stored, self._files)
        out.copy_(values)

    def mapped(self, name: str) -> Tensor | None:
        """None: a checkpoint may be deleted or replaced while its tensors are in use."""
        return None


def locate(path: str | Path, revision: str | None = None, weights: bool = True) -> ModelSource:
    """The model that `path` names: of a run folder the export or, where that is newer, the last checkpoint.

    An adapter's folder, or a run with adapters, names its base model.  weights: they will be read, so they
    are downloaded, or a checkpoint is verified in full (else by the sizes of its files).
    Raises CheckpointError where there is none, or the checkpoint is damaged.
    """
    folder = resolve(path, revision, weights)
    result = exported(folder)
    if is_checkpoint(folder):
        checkpoint = _newest(folder, result, weights)
        if checkpoint is not None:
            return _of_checkpoint(checkpoint, weights)
    elif (folder / "config.json").is_file():
        return ModelSource(folder)
    folder = folder if result is None else folder / RESULT
    adapters = adapter_folders(folder)
    if not adapters or (folder / "config.json").is_file():
        return ModelSource(folder)
    base, specs = read_adapters(adapters)
    where = f"{adapters[0] / ADAPTER_FILE}: base_model_name_or_path"
    return replace(_base(base, None, weights, where), adapters=specs)


#: Where a run leaves what it has trained, in its folder.
RESULT = "model"


def exported(folder: Path) -> Path | None:
    """The config of what a run exported in the end into its `folder`: its model, or its adapters."""
    model = folder / RESULT / "config.json"
    adapters = adapter_folders(folder / RESULT)
    return model if model.is_file() else adapters[0] / ADAPTER_FILE if adapters else None


def _newest(folder: Path, result: Path | None, weights: bool) -> Path | None:
    """The checkpoint at `folder`, or the newest of the run there; None where its export came later."""
    mode: Verify = "full" if weights else "size"
    if result is None:
        return open_checkpoint(folder, mode).path

    def is_newer(checkpoint: Path) -> bool:
        return checkpoint.stat().st_mtime > result.stat().st_mtime

    if not any(is_newer(path) for path in step_folders(folder / CHECKPOINTS).values()):
        return None
    try:
        found = open_checkpoint(folder, mode).path
    except CheckpointError as error:
        _log.warning("%s; using %s", error, result.parent)
        return None
    return found if is_newer(found) else None


def _of_checkpoint(checkpoint: Path, weights: bool) -> ModelSource:
    state = read_state(checkpoint)
    config = state.get("config", {})
    sections = config.get("adapters")
    if not sections:
        return ModelSource(checkpoint / "model_files", checkpoint)
    model = config["model"]
    # a relative path would name another model, or none, where we are not in the run's working directory
    known = state.get("model_path")
    path = known if isinstance(known, str) and Path(known).is_dir() else model["path"]
    base = _base(path, model.get("revision"), weights, f"{checkpoint}: its run's model.path")
    specs = tuple(AdapterSpec.of_section(section) for section in sections)
    return replace(base, adapters=specs, trained=checkpoint)


def _base(path: str, revision: str | None, weights: bool, where: str) -> ModelSource:
    """The model that adapters are for."""
    try:
        found = locate(path, revision, weights)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    if found.adapters:
        raise CheckpointError(f"{where}: {path} has adapters; merge them first (collie export --merge)")
    return found


def load_selected(
    model: nn.Module,
    selected: SelectedProvider,
    *,
    device: torch.device | str,
    dtype: torch.dtype | None,
    added: Collection[str] = (),
    map_files: bool = False,
) -> None:
    """Give `model` the weights of the source that was selected; see `load_weights`."""
    reader, rules = open_source(selected, Slots(model), added)
    load_weights(model, rules, reader, device=device, dtype=dtype, added=added, map_files=map_files)


def open_source(
    selected: SelectedProvider, slots: Slots, added: Collection[str] = ()
) -> tuple[Reader, list[WeightRule]]:
    """The tensors of a source, and the rules that make a module's parameters of them.

    added: parameters of adapters, which are not the model's.
    """
    if selected.checkpoint is None:
        return WeightReader(selected.path), list(selected.provider.weight_map(selected.config))
    rules: list[WeightRule] = [Rename(f"model.{name}", name) for name in slots.tensors if name not in added]
    return CheckpointReader(selected.checkpoint), [*rules, Ignore("optimizer.*"), Ignore("layout.*")]


def stream_parameters(
    selected: SelectedProvider, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(parameter name, whole tensor on the CPU) of a source, without a model; cast to `dtype` if given.

    Raises CheckpointError where the tensors of a folder are not those of its config.
    """
    if selected.checkpoint is not None:
        names = [name for name in read_metadata(selected.checkpoint).tensors if name.startswith("model.")]
        found = ((name.removeprefix("model."), t) for name, t in stream_tensors(selected.checkpoint, names))
    else:
        reader = WeightReader(selected.path)
        with torch.device("meta"):
            slots = Slots(selected.provider.build(selected.config, select_ops()))
        # as strict as loading: what an export left out would be lost
        rules = match_weights(slots, list(selected.provider.weight_map(selected.config)), reader)
        found = (
            item
            for rule in rules
            if not slots.is_copy(rule)
            for item in rule.load({name: reader.get(name) for name in rule.sources}).items()
        )
    for name, tensor in found:
        yield name, tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
