"""The complete module on meta, cut to what one rank of many holds, allocated, and filled from the checkpoint.

In this order: tensor parallelism, stages, activation checkpointing and compilation, ZeRO (FSDP2), memory,
weights.  Each step narrows the shards, so that the last one knows which box of each tensor to read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from collie_core.errors import UserError
from collie_core.layouts.build import Placed, build, has_weights
from collie_core.layouts.partition import partition
from collie_core.layouts.stage import Stage
from collie_core.layouts.tensor_parallel import Cutter, TensorParallel
from collie_core.layouts.vocabulary import Vocabulary
from collie_core.models.adapters import initialise_added
from collie_core.models.forward import model_context
from collie_core.models.loading import Slots, load_pieces, match_weights, reset_buffers
from collie_core.models.sources import open_source
from collie_core.ops import Context
from collie_core.run import whole_shards
from collie_core.shard import Piece, Shard

if TYPE_CHECKING:
    from collie_core.hookspecs import Adapter, ModelProvider
    from collie_core.layouts.grid import Grid
    from collie_core.layouts.native import NativeLayoutPlugin
    from collie_core.models.weight_map import ParallelPlan
    from collie_core.ops import Ops
    from collie_core.run import Run


def place_parts(
    run: Run,
    provider: ModelProvider,
    adapters: Sequence[Adapter],
    ops: Ops,
    grid: Grid,
    options: NativeLayoutPlugin.Options,
    training: bool,
) -> Placed:
    """This rank's part of the model, with its weights.

    Raises CheckpointError where the weights do not fit, ConfigError where the sizes do not fit the model.
    """
    assert run.source is not None
    model = build(run, provider, adapters, ops)
    given = has_weights(model)
    if given and grid.dp.size < grid.world.size:
        raise UserError("a model with weights cannot be cut; with tp_size or pp_size above 1 load it by path")
    slots = Slots(model)
    if given:
        model = model.to(run.device)
    else:
        model = model.to(getattr(torch, run.config.model.dtype))
        reader, rules = open_source(run.source, slots, run.added)
        rules = match_weights(slots, rules, reader, run.added)
    names = {name: slots.copies.get(name, name) for name in slots.tensors}
    shapes = {name: slots.tensors[name].shape for name in slots.tensors if names[name] == name}
    shards = whole_shards(model)
    width, dtype = _hidden(model)
    plan = provider.parallel_plan(run.source.config)
    for adapter in adapters:
        extend = getattr(adapter, "parallel_plan", None)
        plan = plan if extend is None else extend(plan)
    tp = _tensor_parallel(model, plan, shards, grid, options)
    vocabulary = _vocabulary(plan, names, shards, shapes, tp)
    ops = ops if vocabulary is None else ops.for_vocabulary(vocabulary.summed_nll, vocabulary.width)
    stages = _stages(model, run, ops, grid, options, tp, vocabulary)
    shards = _held(stages, names, shards, grid)
    for stage in stages:
        stage.resolve(training, _agreement(grid), may_compile=options.offload == "none")
    zero = options.shards_parameters(grid.dp.size)
    if zero:
        for stage in stages:
            _shard(stage, grid, options)
    device = torch.device("cpu") if options.offload == "cpu" else run.device
    if not given:
        for stage in stages:
            _allocate(stage, device, zero, pinned=device != run.device)
        reset_buffers(model, run.device)
    parameters = {
        names[name]: parameter for stage in stages for name, parameter in stage.named_parameters()
    }
    shards = {name: _final(shards[name], parameters[name], grid) for name in parameters}
    buffers = _buffers(stages)
    if not given:
        pieces: dict[str, Piece] = {
            name: Piece(shard.local, shard.shape, shard.offsets) for name, shard in shards.items()
        }
        pieces |= {name: Piece(b, tuple(b.shape), (0,) * b.ndim) for name, b in buffers.items()}
        load_pieces(pieces, rules, reader)
    run.shards = shards
    initialise_added(run)
    return Placed(
        model, stages, parameters, shards, shapes, tp, width, dtype, zero=zero, buffers=buffers
    )


def _hidden(model: Any) -> tuple[int, torch.dtype]:
    """Width and dtype of the hidden states, by what the embedding makes of eight ids."""
    device = next(model.parameters()).device
    ids = torch.zeros((1, 8), dtype=torch.int64, device=device)
    with torch.no_grad(), torch.device(device):
        h: Tensor = model.embed(ids, model_context(model, Context.build(ids)))
    return h.shape[-1], h.dtype


def _tensor_parallel(
    model: nn.Module,
    plan: ParallelPlan,
    shards: dict[str, Shard],
    grid: Grid,
    options: NativeLayoutPlugin.Options,
) -> TensorParallel | None:
    """Cut the layers, if there are ranks to share them."""
    if grid.tp.size == 1:
        return None
    wanted = options.sequence_parallel
    tp = TensorParallel(grid.tp, plan.sequence if wanted == "auto" else wanted)
    Cutter(plan, tp, grid).cut(model, shards)
    return tp


def _vocabulary(
    plan: ParallelPlan,
    names: Mapping[str, str],
    shards: Mapping[str, Shard],
    shapes: Mapping[str, torch.Size],
    tp: TensorParallel | None,
) -> Vocabulary | None:
    """This rank's words, where the plan cuts a head."""
    heads = [name for name in names if any(fnmatchcase(name, pattern) for pattern in plan.head)]
    heads = [name for name in heads if len(shapes[names[name]]) == 2]
    if tp is None or not heads:
        return None
    size = shapes[names[heads[0]]][0]
    return Vocabulary(tp.group, shards[names[heads[0]]].offsets[0], size, -(-size // tp.size))


def _stages(
    model: Any,
    run: Run,
    ops: Ops,
    grid: Grid,
    options: NativeLayoutPlugin.Options,
    tp: TensorParallel | None,
    vocabulary: Vocabulary | None,
) -> list[Stage]:
    """This rank's stretches; the model keeps no others."""
    keys = list(model.blocks)
    chunks = options.chunks(grid.pp.size)
    total = grid.pp.size * chunks

    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    sizes = [count(block) for block in model.blocks.values()]
    stretches = partition(options.pp_partition, sizes, count(model.embed), count(model.head), total)
    stages = []
    for number in range(grid.pp.rank, total, grid.pp.size):
        blocks = nn.ModuleDict({keys[index]: model.blocks[keys[index]] for index in stretches[number]})
        stages.append(
            Stage(
                model,
                blocks,
                ops,
                run,
                first=number == 0,
                last=number == total - 1,
                tp=tp,
                vocabulary=vocabulary,
                begin=stretches[number].start,
                total=len(keys),
            )
        )
    if grid.pp.size > 1:
        model.blocks = nn.ModuleDict({key: block for stage in stages for key, block in stage.blocks.items()})
        if stages[0].embed is None:
            model.register_module("embed", None)
        if stages[-1].head is None:
            model.register_module("head", None)
    return stages


def _held(
    stages: Sequence[Stage], names: Mapping[str, str], shards: Mapping[str, Shard], grid: Grid
) -> dict[str, Shard]:
    """The shards of the parameters that this rank has; a tied one may be on the last stage too."""
    held = {}
    for stage in stages:
        for name, parameter in stage.named_parameters():
            held[names[name]] = replace(shards[names[name]], local=parameter)
    if grid.pp.size > 1:
        # tied between the embedding and the head: on both ends, and the sum of both gradients on each
        twice = [
            original
            for name, original in names.items()
            if name != original and name.startswith("head.") and original.startswith("embed.")
        ]
        for name in twice:
            if name in held:
                shard = held[name]
                assert grid.ends is not None
                held[name] = replace(shard, sums=(*shard.sums, grid.ends), copies=shard.copies * 2)
    return held


def _agreement(grid: Grid) -> Callable[[int], int]:
    """The most of what the ranks of this stage say."""

    def agree(number: int) -> int:
        if grid.replica.group is None:
            return number
        common = torch.tensor(number, device=grid.device)
        dist.all_reduce(common, dist.ReduceOp.MAX, group=grid.replica.group)
        return int(common)

    return agree


def _shard(stage: Stage, grid: Grid, options: NativeLayoutPlugin.Options) -> None:
    """ZeRO by FSDP2: each block is a unit, gathered when it runs; the rest of the stage is one more."""
    low = next(stage.parameters()).dtype != torch.float32
    pinned = grid.device.type == "cuda"
    offload = CPUOffloadPolicy(pin_memory=pinned) if options.offload == "cpu" else OffloadPolicy()

    def shard(module: nn.Module, reshard: bool) -> None:
        fully_shard(
            module,
            mesh=grid.data_mesh(),
            reshard_after_forward=reshard,
            mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32 if low else None),
            offload_policy=offload,
        )

    gathered_anew = options.zero_stage == 3
    for block in stage.blocks.values():
        shard(block, gathered_anew)
    tied = stage.embed is not None and stage.head is not None and (
        {id(p) for p in stage.embed.parameters()} & {id(p) for p in stage.head.parameters()}
    )
    if stage.embed is not None and not tied:
        shard(stage.embed, gathered_anew)
    shard(stage, False)  # what is used at the end of forward and the beginning of backward
    register_fsdp_forward_method(stage, "next_logits")
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the loss is divided by the tokens of all ranks
            module.set_force_sum_reduction_for_comms(True)


def _uneven(module: nn.Module) -> bool:
    """Whether the ranks have different numbers of rows of some parameter."""
    return any(
        parameter.shape[0] % parameter.device_mesh.size()
        for parameter in module.parameters()
        if isinstance(parameter, DTensor)
    )


def _allocate(stage: Stage, device: torch.device, zero: bool, pinned: bool) -> None:
    """Memory for parameters and buffers, without values."""
    if zero:
        stage.to_empty(device=device)
        for module in stage.modules():
            if isinstance(module, FSDPModule) and (pinned or _uneven(module)):
                module.unshard()  # lets FSDP2 move shards that it pads or pins to where they stay
                module.reshard()
        return
    slots = Slots(stage)
    for name, tensor in list(slots.tensors.items()):
        if name not in slots.copies:
            slots.allocate(name, device, tensor.dtype)


def _final(shard: Shard, parameter: nn.Parameter, grid: Grid) -> Shard:
    """The shard after ZeRO, with the memory that is updated."""
    if not isinstance(parameter, DTensor):
        sums = shard.sums if grid.dp.group is None else (*shard.sums, grid.dp.group)
        return replace(shard, local=parameter, sums=sums, copies=shard.copies * grid.dp.size)
    local = nn.Parameter(parameter.to_local().detach(), requires_grad=parameter.requires_grad)
    rows = parameter.shape[0]
    begin = min(rows, grid.dp.rank * -(-rows // grid.dp.size))
    shard = replace(shard, local=local)
    return shard if grid.dp.group is None else shard.cut(0, begin, grid.dp.group)


def _buffers(stages: Sequence[Stage]) -> dict[str, Tensor]:
    """Persistent buffers by name."""
    found: dict[str, Tensor] = {}
    for stage in stages:
        persistent = stage.state_dict().keys()
        found |= {name: buffer for name, buffer in stage.named_buffers() if name in persistent}
    return found
