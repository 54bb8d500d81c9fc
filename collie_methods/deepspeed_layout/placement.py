"""The model's weights where DeepSpeed takes over: whole on every rank, or cut by ZeRO-3 as they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from collie_core.layouts.build import build, has_weights, place_whole
from collie_core.layouts.stage import Stage
from collie_core.models.adapters import filler
from collie_core.models.buffers import cast, reset_buffers
from collie_core.models.loading import Slots, load_pieces, match_weights
from collie_core.models.sources import open_source
from collie_core.run import whole_shards
from collie_core.shard import Piece, Shard

if TYPE_CHECKING:
    from collie_core.hookspecs import Adapter, ModelProvider
    from collie_core.ops import Ops
    from collie_core.run import Run


@dataclass(frozen=True)
class Placed:
    """The model with its weights; see `collie_core.layouts.build.Placed` for the names."""

    model: nn.Module
    stage: Stage
    shards: dict[str, Shard]
    whole_shapes: dict[str, torch.Size]
    buffers: dict[str, Tensor]

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter by name, a tied one once; what it holds is DeepSpeed's business."""
        return {name: shard.local for name, shard in self.shards.items()}


class Root(nn.Module):
    """The module that DeepSpeed wraps: every use of the model is a call of it, since ZeRO-3 follows the
    order of the modules from one call of the outermost to the next."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, method: str, *args: Any) -> Any:
        """`stage.method(*args)`."""
        return getattr(self.stage, method)(*args)


def place(run: Run, provider: ModelProvider, adapters: Sequence[Adapter], ops: Ops) -> Placed:
    """The whole model on every rank, for ZeRO 0 to 2.  Raises CheckpointError where weights do not fit."""
    placed = place_whole(run, provider, adapters, ops)
    return Placed(placed.model, placed.stages[0], placed.shards, placed.whole_shapes, placed.buffers)


def place_partitioned(
    run: Run,
    provider: ModelProvider,
    adapters: Sequence[Adapter],
    ops: Ops,
    deepspeed: Any,
    ds_config: Mapping[str, Any],
) -> Placed:
    """The model cut by ZeRO-3, one parameter whole at a time: rank 0 reads it, DeepSpeed sends it to all.

    Raises CheckpointError where the weights do not fit.
    """
    assert run.source is not None
    model = build(run, provider, adapters, ops)
    dtype = getattr(torch, run.config.model.dtype)
    given = has_weights(model)
    slots = Slots(model)
    if not given:
        cast(model, dtype)
        reader, rules = open_source(run.source, slots, run.added)
        rules = match_weights(slots, rules, reader, run.added)
    shards = whole_shards(model)
    shapes = {name: tensor.shape for name, tensor in slots.tensors.items() if name not in slots.copies}
    fill = filler(run)
    for name in shapes:
        values = slots.allocate(name, run.device, dtype)
        if name in run.added:
            whole = nn.Parameter(values, requires_grad=False)
            fill(name, Shard.whole(name, whole))
        elif not given and (run.first or name not in shards):  # buffers are not sent
            load_pieces({name: Piece(values, tuple(shapes[name]), (0,) * values.ndim)}, rules, reader)
        parameter = slots.tensors[name]
        if isinstance(parameter, nn.Parameter):
            shards[name] = replace(shards[name], local=parameter)
            alone = nn.ParameterList([parameter])
            deepspeed.zero.Init(module=alone, config_dict_or_path=dict(ds_config), dtype=dtype)
    model.to(run.device) if given else reset_buffers(model, run.device)
    blocks: Any = model.blocks
    buffers = {name: t for name, t in slots.tensors.items() if not isinstance(t, nn.Parameter)}
    return Placed(model, Stage(model, blocks, ops, run), shards, shapes, buffers)
