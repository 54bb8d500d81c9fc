"""Reads chunks of tensors out of the safetensors files of a folder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from collie_core.checkpoint.metadata import METADATA_FILE, Chunk, StoredTensor
from collie_core.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

#: Mapped pages count as resident memory: files are opened anew when this much was read from them.
_MAPPED_BYTES = 64 * 2**20


class TensorFiles:
    """Reads chunks out of the safetensors files of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}
        self._mapped = 0

    def read(self, name: str, stored: StoredTensor, chunk: Chunk, box: tuple[slice, ...] = ()) -> Tensor:
        """The chunk, or the box of it; checked against what the metadata say."""
        path, key = self.folder / chunk.file, stored.key(name, chunk)
        num_bytes = math.prod(chunk.sizes) * stored.torch_dtype.itemsize
        if self._mapped + num_bytes > _MAPPED_BYTES:
            self._open.clear()
            self._mapped = 0
        self._mapped += num_bytes
        try:
            if chunk.file not in self._open:
                self._open[chunk.file] = safe_open(path, framework="pt")
            tensor: Tensor = self._open[chunk.file].get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: tensor {key!r} cannot be read: {error}") from error
        if tuple(tensor.shape) != chunk.sizes or tensor.dtype != stored.torch_dtype:
            found = f"{list(tensor.shape)} {tensor.dtype}"
            expected = f"{list(chunk.sizes)} {stored.torch_dtype}"
            raise CheckpointError(f"{path}: tensor {key!r} is {found}, {METADATA_FILE} says {expected}")
        return tensor[box]
