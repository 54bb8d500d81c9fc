"""How checkpoints spell the names of the library's parameters."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from collie_core.plugin import ConfigError, Ignore, WeightRule


def stored_names(folder: Path | None, stock: PreTrainedModel) -> dict[str, str]:
    """The library's name of each tensor -> its name in the checkpoint.

    The library writes some under other names than it uses (GPT-NeoX: `embed_out`), and checkpoints of a base
    model alone, such as GPT-2's, leave its prefix out.  What the folder has decides.
    Raises ConfigError where the library stores tensors in another form than it computes with.
    """
    mine = {name: torch.empty_like(tensor) for name, tensor in stock.state_dict(keep_vars=True).items()}
    written = revert_weight_conversion(stock, dict(mine))
    name_of = {id(tensor): name for name, tensor in mine.items()}
    changed = [name for name, tensor in written.items() if id(tensor) not in name_of]
    if changed:
        raise ConfigError(f"{changed[0]} is stored in another form than transformers computes with")
    found = _names(folder) if folder is not None else set()
    prefix = f"{stock.base_model_prefix}."
    names = {}
    for usual, tensor in written.items():
        name = name_of[id(tensor)]
        spellings = (usual, name, usual.removeprefix(prefix), name.removeprefix(prefix))
        names[name] = next((spelling for spelling in spellings if spelling in found), usual)
    return names


def ignored(stock: PreTrainedModel) -> list[WeightRule]:
    """Tensors of earlier versions of the library that carry nothing: masks and rotary frequencies."""
    patterns = {
        "*.attn.bias",
        "*.attn.masked_bias",
        "*.attention.bias",
        "*.attention.masked_bias",
        "*.attn.causal_mask",
        "*.rotary_emb.inv_freq",
    }
    for text in getattr(stock, "_keys_to_ignore_on_load_unexpected", None) or ():
        patterns.add("*" + re.sub(r"\\d\+|\.\*", "*", text.strip("^$")).replace("\\.", "."))
    return [Ignore(pattern) for pattern in sorted(patterns)]


def _names(folder: Path) -> set[str]:
    """Names of the tensors in a folder, from an index or the header of a single file."""
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).is_file():
            try:
                return set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"])
            except (ValueError, KeyError, TypeError):
                return set()  # the loader tells what is wrong with it
    single = folder / "model.safetensors"
    if single.is_file():
        try:
            with single.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        except (ValueError, OSError, OverflowError, MemoryError):
            return set()
        return set(header)
    return _names_of_bin(folder / "pytorch_model.bin")


def _names_of_bin(path: Path) -> set[str]:
    if not path.is_file():
        return set()
    try:
        return set(torch.load(path, map_location="meta", mmap=True, weights_only=True))
    except Exception:  # the loader tells what is wrong with it
        return set()
