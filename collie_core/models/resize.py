"""Another vocabulary size for a model that is already loaded."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from collie_core.errors import UserError
from collie_core.models.loading import Slots

if TYPE_CHECKING:
    from collie_core.models.causal_lm import Origin

_CONFIG_KEYS = ("vocab_size", "padded_vocab_size")


def resize_vocabulary(model: nn.Module, origin: Origin, size: int) -> None:
    """Cut or extend embedding and head to `size` rows, and bring the configs of `origin` up to date."""
    if size < 1:
        raise UserError(f"resize_token_embeddings({size}): expected at least 1")
    plan = origin.provider.parallel_plan(origin.config)
    slots = Slots(model)
    embedding, names = (
        [name for name in slots.tensors if any(fnmatchcase(name, pattern) for pattern in patterns)]
        for patterns in (plan.embedding, (*plan.embedding, *plan.head))
    )
    if not embedding:  # of a head alone, either: it would no longer fit
        raise UserError(
            f"{type(model).__name__} names no embedding in its parallel plan; it cannot be resized"
        )
    resized: dict[int, nn.Parameter] = {}
    for name in names:
        old = slots.tensors[name]
        if id(old) not in resized:
            resized[id(old)] = nn.Parameter(_resized(old.detach(), size), old.requires_grad)
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        setattr(owner, leaf, resized[id(old)])
        if isinstance(owner, nn.Embedding):
            owner.num_embeddings = size
        elif isinstance(owner, nn.Linear):
            owner.out_features = size
    stated = [key for key in _CONFIG_KEYS if key in origin.hf_config] or _CONFIG_KEYS[:1]
    origin.hf_config = origin.hf_config | dict.fromkeys(stated, size)
    origin.config = origin.provider.read_config(origin.hf_config)


def _resized(old: Tensor, size: int) -> Tensor:
    """The first `size` rows; new ones are the mean of the old, so that no new token begins likely."""
    if size <= len(old):
        return old[:size].clone()
    mean = old.float().mean(0, keepdim=True).to(old.dtype)
    return torch.cat([old, mean.expand(size - len(old), *old.shape[1:])])
