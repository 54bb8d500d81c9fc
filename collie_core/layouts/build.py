"""From a provider to a module that runs: meta, adapters, trainable patterns; on one process the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from collie_core.config.problems import ConfigProblems, Key
from collie_core.errors import ConfigError
from collie_core.layouts.stage import Stage
from collie_core.models.adapters import adapt, initialise_added
from collie_core.models.buffers import persistent_buffers
from collie_core.models.causal_lm import CausalLM
from collie_core.models.loading import Slots
from collie_core.models.sources import load_selected
from collie_core.run import whole_shards

if TYPE_CHECKING:
    from collie_core.hookspecs import Adapter, ModelProvider
    from collie_core.layouts.tensor_parallel import TensorParallel
    from collie_core.ops import Ops
    from collie_core.run import Run
    from collie_core.shard import Shard


@dataclass
class Placed:
    """A model where it runs.

    stages: this rank's stretches of it, in order.  parameters: those of the modules, by their names in the
    whole model.  shards: this rank's part of each, under the same names; frozen ones too.
    whole_shapes: shape of every parameter and persistent buffer of the whole model, in its order.
    width, dtype: of the hidden states between stages, where there are several.
    zero: the parameters are sharded over dp.
    read_from: the checkpoint whose `model.*` tensors it still holds, if there is one.
    """

    model: nn.Module
    stages: list[Stage]
    parameters: dict[str, nn.Parameter]
    shards: dict[str, Shard]
    whole_shapes: dict[str, torch.Size]
    tp: TensorParallel | None = None
    width: int = 0
    dtype: torch.dtype = torch.float32
    zero: bool = False
    buffers: dict[str, Tensor] = field(default_factory=dict)
    read_from: Path | None = None

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained."""
        return {name: p for name, p in self.parameters.items() if p.requires_grad}


def build(run: Run, provider: ModelProvider, adapters: Sequence[Adapter], ops: Ops) -> nn.Module:
    """The complete module with adapters in place (`run.added`) and `requires_grad` set.

    Plugins have changed how it computes.  It is on meta, unless the user gave a model with weights.
    Raises ConfigError where a pattern of trainable parameters matches nothing.
    """
    assert run.source is not None
    if run.model is not None:
        model: nn.Module = run.model
    else:
        with torch.device("meta"):
            model = provider.build(run.source.config, ops)
    run.added = adapt(model, adapters)
    set_trainable(model, run)
    if run.model_built is not None:
        run.model_built(model)
    return model


def place_whole(run: Run, provider: ModelProvider, adapters: Sequence[Adapter], ops: Ops) -> Placed:
    """The module with its weights on one process, with nothing wrapped around it.

    Raises CheckpointError where the weights do not fit.
    """
    assert run.source is not None
    model = build(run, provider, adapters, ops)
    given = has_weights(model)
    if given:
        model = model.to(run.device)
        if run.added and isinstance(model, CausalLM):  # the user may save, merge and use it afterwards
            model.adapters = run.added
    else:
        load_selected(
            model,
            run.source,
            device=run.device,
            dtype=getattr(torch, run.config.model.dtype),
            added=run.added,
        )
    run.shards = whole_shards(model)
    initialise_added(run)
    stage = Stage(model, _blocks(model), ops, run)
    slots = Slots(model)
    shapes = {name: tensor.shape for name, tensor in slots.tensors.items() if name not in slots.copies}
    parameters = dict(model.named_parameters())
    return Placed(
        model,
        [stage],
        parameters,
        run.shards,
        shapes,
        buffers=persistent_buffers(model),
        read_from=read_from(run, given),
    )


def read_from(run: Run, given: bool) -> Path | None:
    """The checkpoint that a model was filled from, or its adapters were where it has some, as only these are
    in the run's own checkpoints.  given: it came with weights."""
    assert run.source is not None
    if run.added:
        return run.source.trained
    return None if given else run.source.checkpoint


def has_weights(model: nn.Module) -> bool:
    """False while the module is on meta."""
    return not next(model.parameters()).is_meta


def _blocks(model: Any) -> nn.ModuleDict:
    blocks: nn.ModuleDict = model.blocks
    return blocks


def set_trainable(model: nn.Module, run: Run) -> None:
    """Apply `train.trainable` and `train.frozen`; a parameter must match the one and not the other.

    Raises ConfigProblems for a pattern of these, or a group of `optimizer.param_groups`, that matches none.
    Where there are adapters, what they did not add is frozen, and no pattern may say otherwise.
    """
    train = run.config.train
    if run.added:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name in run.added)
    names = [name for name, _ in model.named_parameters()]
    for pattern in train.trainable if run.added else ():
        frozen = [name for name in names if fnmatchcase(name, pattern) and name not in run.added]
        if frozen:
            message = f"{pattern!r} matches {frozen[0]}, which is frozen: adapters train their own parameters"
            raise run.config.problems(ConfigProblems([(("train", "trainable"), message)]))
    wanted: list[tuple[Key, list[str]]] = [
        (("train", key), [pattern]) for key in ("trainable", "frozen") for pattern in getattr(train, key)
    ]
    for index, group in enumerate(run.config.optimizer.param_groups):
        # of several patterns in one group some may be for other families
        wanted.append((("optimizer", "param_groups", index, "params"), group.params))
    for path, patterns in wanted:
        if not any(fnmatchcase(name, pattern) for pattern in patterns for name in names):
            told = " or ".join(map(repr, patterns)) or "an empty list"
            message = f"{told} matches no parameter (such as {names[0]!r})"
            raise run.config.problems(ConfigProblems([(path, message)]))
    for name, parameter in model.named_parameters():
        if train.trainable and not any(fnmatchcase(name, pattern) for pattern in train.trainable):
            parameter.requires_grad_(False)
        if any(fnmatchcase(name, pattern) for pattern in train.frozen):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        if not (train.trainable or train.frozen or run.added):  # a module comes so after a merge of adapters
            raise ConfigError(
                "model: none of its parameters needs a gradient; model.requires_grad_() trains them all"
            )
        message = "leaves no parameter to train"
        raise run.config.problems(
            ConfigProblems([(("train", "trainable" if train.trainable else "frozen"), message)])
        )
