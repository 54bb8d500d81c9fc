"""A model in Hugging Face layout: weights, configs and tokenizer, published whole."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from collie_core.errors import CheckpointError, ConfigError, UserError, nearest
from collie_core.files import fsync_dir, json_text
from collie_core.models.loading import Slots, export_weights
from collie_core.models.weight_files import SAFETENSORS, SAFETENSORS_INDEX
from collie_core.models.weight_map import Rename
from collie_core.ops import select_ops

if TYPE_CHECKING:
    from collie_core.hookspecs import ModelProvider

#: What belongs to a tokenizer in a model folder; never code.
TOKENIZER_FILES = (
    "tokenizer*.json",
    "tokenizer*.model",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "ice_text.model",
)


def require_empty(folder: Path) -> None:
    """Raise UserError for what is not a new or empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: expected a new or empty folder, and it is not empty")


def export_pretrained(
    folder: Path,
    provider: ModelProvider,
    config: Any,
    hf_config: Mapping[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    source: Path | None = None,
    tokenizer: Any = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
    relative: str | None = None,
    replace: bool = False,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a model folder.  `tensors` are (parameter name, whole tensor), consumed one at a time.

    source: the folder that the model came from; its generation config and, without `tokenizer`, its
    tokenizer files are copied (for a relative the provider's tokenizer saves itself).  dtypes: of the
    parameters; None: all have that of the first.  relative: write as this one of `provider.export_as`.
    replace: the folder may hold an earlier export.
    The folder appears whole; an earlier export in it loses its weights before the new ones move in.
    Raises UserError for a folder that is not empty, ConfigError for an unknown relative, CheckpointError
    where `tensors` are not those of the model.
    """
    if not replace:
        require_empty(folder)
    rules, written_config = list(provider.weight_map(config)), dict(hf_config)
    if relative is not None:
        known = provider.export_as
        if relative not in known:
            names = ", ".join(known) or "none"
            raise ConfigError(f"cannot export as {relative!r}{nearest(relative, known)} (known: {names})")
        rules = list(known[relative].weight_map(config))
        written_config = known[relative].config(hf_config)
    in_place = folder.is_dir()
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder / ".saving" if in_place else folder.with_name(f".{folder.name}.saving")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        twice = {rule.target for rule in rules if isinstance(rule, Rename) and rule.stored_twice}
        specs, stream = _specs(provider, config, tensors, dtypes, twice)
        export_weights(aside, stream, specs, rules, max_shard_bytes)
        _write_configs(aside, written_config, specs, source)
        if tokenizer is None and relative is not None and source is not None and has_tokenizer(source):
            tokenizer = provider.tokenizer(source)  # in the form that any tool reads
        if tokenizer is not None:
            tokenizer.save_pretrained(str(aside))
        elif source is not None and source.resolve() != folder.resolve():
            _copy_tokenizer(source, aside)
        _publish(aside, folder, in_place)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _specs(
    provider: ModelProvider,
    config: Any,
    tensors: Iterable[tuple[str, Tensor]],
    dtypes: Mapping[str, torch.dtype] | None,
    twice: set[str],
) -> tuple[dict[str, tuple[torch.Size, torch.dtype]], Iterator[tuple[str, Tensor]]]:
    """Shapes and dtypes of the parameters in the module's order, and the stream in those dtypes.

    Of tied parameters there is one, but for the names in `twice`, which come after it with its values.
    """
    with torch.device("meta"):
        slots = Slots(provider.build(config, select_ops()))
    first_of: Iterator[tuple[str, Tensor]] = iter(tensors)
    first = next(first_of, None)
    stream = first_of if first is None else itertools.chain([first], first_of)
    common = first[1].dtype if first is not None else torch.float32
    copies = {name: original for name, original in slots.copies.items() if name in twice}
    specs = {}
    for name, tensor in slots.tensors.items():
        if name in slots.copies and name not in copies:
            continue
        dtype = common if tensor.dtype.is_floating_point else tensor.dtype
        specs[name] = (tensor.shape, dtypes[copies.get(name, name)] if dtypes is not None else dtype)
    return specs, _checked(_with_copies(stream, copies), specs)


def _with_copies(
    stream: Iterator[tuple[str, Tensor]], copies: Mapping[str, str]
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in stream:
        yield name, tensor
        yield from ((copy, tensor) for copy, original in copies.items() if original == name)


def _checked(
    stream: Iterator[tuple[str, Tensor]], specs: Mapping[str, tuple[torch.Size, torch.dtype]]
) -> Iterator[tuple[str, Tensor]]:
    seen = set()
    for name, tensor in stream:
        if name not in specs or tensor.shape != specs[name][0]:
            expected = list(specs[name][0]) if name in specs else "no such parameter"
            raise CheckpointError(f"export: {name} has shape {list(tensor.shape)}, expected {expected}")
        seen.add(name)
        yield name, tensor.to(specs[name][1])
    missing = [name for name in specs if name not in seen]
    if missing:
        raise CheckpointError(f"export: no tensor for {', '.join(missing)}")


def _write_configs(
    folder: Path,
    hf_config: dict[str, Any],
    specs: Mapping[str, tuple[torch.Size, torch.dtype]],
    source: Path | None,
) -> None:
    """config.json with the dtype of the weights, and the source's generation config."""
    floating = [dtype for _, dtype in specs.values() if dtype.is_floating_point]
    if floating:
        keys = [key for key in ("dtype", "torch_dtype") if key in hf_config] or ["torch_dtype"]
        hf_config = hf_config | dict.fromkeys(keys, str(floating[0]).removeprefix("torch."))
    (folder / "config.json").write_text(json_text(hf_config), encoding="utf-8")
    if source is not None and (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")


def _tokenizer_files(folder: Path) -> list[Path]:
    return [
        path
        for path in folder.iterdir()
        if path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in TOKENIZER_FILES)
    ]


def has_tokenizer(folder: Path) -> bool:
    """True where there is more than a description of a tokenizer."""
    names = {path.name for path in _tokenizer_files(folder)}
    return bool(names - {"tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"})


def _copy_tokenizer(source: Path, folder: Path) -> None:
    for path in _tokenizer_files(source):
        shutil.copyfile(path, folder / path.name)


def _publish(aside: Path, folder: Path, in_place: bool) -> None:
    """Move the finished files to their place, so that no reader ever finds a mix of old and new weights."""
    fsync_dir(aside)
    if not in_place:
        os.replace(aside, folder)
        fsync_dir(folder.parent)
        return
    new = {path.name for path in aside.iterdir()}
    for path in list(folder.iterdir()):
        stale = path.name in (SAFETENSORS, SAFETENSORS_INDEX) or fnmatchcase(
            path.name, "model-*-of-*.safetensors"
        )
        if stale and not (path.name == SAFETENSORS and SAFETENSORS in new):
            path.unlink()
    # what makes the weights visible goes last
    for name in sorted(new, key=lambda name: name in (SAFETENSORS, SAFETENSORS_INDEX)):
        if (folder / name).is_dir():  # a tokenizer's chat templates; a folder replaces none that has files
            shutil.rmtree(folder / name)
        os.replace(aside / name, folder / name)
    fsync_dir(folder)
