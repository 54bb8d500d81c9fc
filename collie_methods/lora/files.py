"""Folders of adapters in peft's layout: adapter_config.json, and tensors in adapter_model.safetensors.

peft itself writes and reads the config; nothing in a folder is ever unpickled.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from collie_core.plugin import CheckpointError

TENSORS = "adapter_model.safetensors"


def write_folder(folder: Path, config: Any, tensors: Mapping[str, Tensor]) -> None:
    """config: a PeftConfig.  tensors: by the names that peft gives them."""
    config.save_pretrained(str(folder))
    whole = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    save_file(whole, folder / TENSORS, metadata={"format": "pt"})


def read_folder(folder: Path, kind: type) -> tuple[Any, dict[str, Tensor]]:
    """The config, of class `kind` of peft, and the tensors.  Raises CheckpointError, naming the file."""
    from peft import PeftConfig

    if not (folder / "adapter_config.json").is_file():  # peft would ask a hub
        inside = sorted(path.parent for path in folder.glob("**/adapter_config.json"))[:3]  # say, of a run
        hint = f", did you mean {' or '.join(map(str, inside))}?" if inside else ""
        raise CheckpointError(f"{folder}: no folder of an adapter: it has no adapter_config.json{hint}")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder / 'adapter_config.json'}: peft cannot read it: {reason}") from None
    if not isinstance(config, kind):
        raise CheckpointError(f"{folder}: holds a {type(config).__name__}, expected a {kind.__name__}")
    path = folder / TENSORS
    if not path.is_file():
        other = folder / "adapter_model.bin"
        hint = "is not read: convert it with peft's save_pretrained"
        raise CheckpointError(f"{other}: {hint}" if other.is_file() else f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it has no iterator)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    empty = [name for name, tensor in tensors.items() if not tensor.numel()]
    if empty or not tensors:
        raise CheckpointError(f"{path}: {empty[0] if empty else 'it'} holds no values")
    return config, tensors


def refuse_others(folder: Path, config: Any, neutral: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise CheckpointError for a key of the config that changes the result and is not computed here.

    neutral: key -> values that change nothing.
    """
    for key, values in neutral.items():
        value = getattr(config, key, None)
        if value not in (None, *values) and value:
            raise CheckpointError(f"{folder / 'adapter_config.json'}: {key}: {value!r} is not supported")


def base_model(path: str) -> str:
    """`base_model_name_or_path` for a run's model.path: a hub id, or a folder from wherever it is asked."""
    return str(Path(path).resolve()) if Path(path).is_dir() else path
