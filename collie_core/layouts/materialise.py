"""From a provider to a module with weights: meta, adapters, trainable patterns, allocation, loading."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from collie_core.config.problems import ConfigProblems
from collie_core.models.sources import load_selected

if TYPE_CHECKING:
    from collie_core.hookspecs import Adapter, ModelProvider
    from collie_core.ops import Ops
    from collie_core.run import Run


def materialise(run: Run, provider: ModelProvider, adapters: Sequence[Adapter], ops: Ops) -> nn.Module:
    """The module on `run.device` with its weights, adapters in place, and `requires_grad` set.

    Raises CheckpointError where the weights do not fit, ConfigError where a pattern matches nothing.
    """
    assert run.source is not None
    if run.model is not None:
        model = run.model.to(run.device)
    else:
        with torch.device("meta"):
            model = provider.build(run.source.config, ops)
    added_by: dict[str, Adapter] = {}
    for adapter in adapters:
        before = {name for name, _ in model.named_parameters()}
        adapter.adapt(model)
        added_by |= {name: adapter for name, _ in model.named_parameters() if name not in before}

    def initialise(name: str, values: Tensor) -> None:
        added_by[name].initialise(name, values)

    if run.model is None:
        dtype = getattr(torch, run.config.model.dtype)
        load_selected(
            model, run.source, device=run.device, dtype=dtype, initialise=initialise if adapters else None
        )
    else:
        for name, parameter in model.named_parameters():
            if name in added_by:
                initialise(name, parameter.detach())
    set_trainable(model, run)
    return model


def set_trainable(model: nn.Module, run: Run) -> None:
    """Apply `train.trainable` and `train.frozen`; a parameter must match the one and not the other."""
    train = run.config.train
    names = [name for name, _ in model.named_parameters()]
    for key in ("trainable", "frozen"):
        for pattern in getattr(train, key):
            if not any(fnmatchcase(name, pattern) for name in names):
                message = f"{pattern!r} matches no parameter (such as {names[0]!r})"
                raise run.config.problems(ConfigProblems([(("train", key), message)]))
    for name, parameter in model.named_parameters():
        if train.trainable and not any(fnmatchcase(name, pattern) for pattern in train.trainable):
            parameter.requires_grad_(False)
        if any(fnmatchcase(name, pattern) for pattern in train.frozen):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        message = "leaves no parameter to train"
        raise run.config.problems(
            ConfigProblems([(("train", "trainable" if train.trainable else "frozen"), message)])
        )
