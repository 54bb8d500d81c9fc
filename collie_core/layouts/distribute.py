"""The complete module on meta, cut to what one rank of many holds, allocated, and filled from the checkpoint.

In this order: tensor parallelism, stages, activation checkpointing and compilation, ZeRO (FSDP2), memory,
weights.  Each step narrows the shards, so that the last one knows which box of each tensor to read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import accumulate
from operator import or_
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from collie_core.errors import UserError
from collie_core.layouts.build import Placed, build, has_weights, read_from
from collie_core.layouts.explain import passes_alive
from collie_core.layouts.partition import partition
from collie_core.layouts.stage import Stage
from collie_core.layouts.tensor_parallel import Cutter, TensorParallel, check_heads
from collie_core.layouts.ties import check_ties, tied_over_ends
from collie_core.layouts.vocabulary import Vocabulary
from collie_core.models.adapters import initialise_added
from collie_core.models.buffers import cast, persistent_buffers, reset_buffers
from collie_core.models.forward import model_context
from collie_core.models.loading import Slots, load_pieces, match_weights
from collie_core.models.packed import check_blocks, unpacked_size
from collie_core.models.sources import open_source
from collie_core.ops import Context
from collie_core.run import whole_shards
from collie_core.shard import Piece, Shard
from collie_core.together import gather

if TYPE_CHECKING:
    from collie_core.hookspecs import Adapter, ModelProvider
    from collie_core.layouts.grid import Grid
    from collie_core.layouts.options import NativeOptions
    from collie_core.models.weight_map import ParallelPlan
    from collie_core.ops import Ops
    from collie_core.run import Run


def place_parts(
    run: Run,
    provider: ModelProvider,
    adapters: Sequence[Adapter],
    ops: Ops,
    grid: Grid,
    options: NativeOptions,
    training: bool,
) -> Placed:
    """This rank's part of the model, with its weights.

    Raises CheckpointError where the weights do not fit, ConfigError where the sizes do not fit the model.
    """
    assert run.source is not None
    model = build(run, provider, adapters, ops)
    given = has_weights(model)
    slots = Slots(model)
    if given:
        model = _given(model, run, grid)
    else:
        cast(model, getattr(torch, run.config.model.dtype))
        reader, rules = open_source(run.source, slots, run.added)
        rules = match_weights(slots, rules, reader, run.added)
    names = {name: slots.copies.get(name, name) for name in slots.tensors}
    shapes = {name: slots.tensors[name].shape for name in slots.tensors if names[name] == name}
    shards = whole_shards(model)
    width, dtype = _hidden(model) if grid.pp.size > 1 else (0, torch.float32)
    plan = _plan(provider, run, adapters)
    if not given:
        check_ties(plan, names)
    stretches = _stretches(model, grid, options)
    ends = tied_over_ends(names, _keys(model), stretches) if grid.pp.size > 1 else set()
    trains = _trains(model, stretches)
    tp = _tensor_parallel(model, plan, shards, grid, options)
    vocabulary = _vocabulary(plan, names, shards, shapes, tp)
    ops = ops if vocabulary is None else ops.for_vocabulary(vocabulary.summed_nll, vocabulary.width)
    stages = _stages(model, run, ops, grid, stretches, trains, tp, vocabulary)
    shards = _held(stages, names, shards, grid, ends)
    agree, alive = _agreement(grid), passes_alive(run.config, options, grid.pp.rank)
    for stage in stages:
        stage.resolve(training, agree, may_compile=options.offload == "none", alive=alive)
    _make_room(model, stages, grid, options, given)
    parameters = {
        names[name]: parameter for stage in stages for name, parameter in stage.named_parameters()
    }
    sharded = options.shards_parameters(grid.dp.size)
    run.shards = {name: _final(shards[name], parameters[name], grid, sharded) for name in parameters}
    buffers = {name: buffer for stage in stages for name, buffer in persistent_buffers(stage).items()}
    if not given:
        pieces = {
            name: Piece(shard.local, shard.shape, shard.offsets) for name, shard in run.shards.items()
        }
        pieces |= {name: Piece.of(buffer) for name, buffer in buffers.items()}
        load_pieces(pieces, rules, reader, slots.packings)
    initialise_added(run)
    return Placed(
        model,
        stages,
        parameters,
        run.shards,
        shapes,
        tp,
        width,
        dtype,
        zero=sharded,
        buffers=buffers,
        read_from=read_from(run, given),
    )


def check_sizes(
    model: nn.Module,
    run: Run,
    provider: ModelProvider,
    adapters: Sequence[Adapter],
    grid: Grid,
    options: NativeOptions,
) -> None:
    """Raises ConfigError where the sizes do not fit the complete module, which may be on meta."""
    plan = _plan(provider, run, adapters)
    check_heads(plan, grid.tp.size)
    check_blocks(model, plan, grid.tp.size)
    _stretches(model, grid, options)


def _given(model: nn.Module, run: Run, grid: Grid) -> nn.Module:
    """The user's own module with the values that the first rank gave it, on every rank.

    Raises UserError where it would have to be cut, or where the ranks gave different modules.
    """
    if grid.dp.size < grid.world.size:
        raise UserError("a model with weights cannot be cut; with tp_size or pp_size above 1 load it by path")
    model = model.to(run.device)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    own = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors.items()]
    for rank, other in enumerate(gather(own, grid.control)):
        differing = sorted({entry[0] for entry in set(own) ^ set(other)})
        if differing:
            raise UserError(f"rank {rank} gave a model whose {differing[0]} is not that of other ranks")
    for _, tensor in sorted(tensors.items()):
        values = tensor.detach().contiguous()
        dist.broadcast(values.view(-1).view(torch.uint8), 0, group=grid.dp.group)
        tensor.detach().copy_(values)
    return model


def _plan(provider: ModelProvider, run: Run, adapters: Sequence[Adapter]) -> ParallelPlan:
    """The provider's plan, as the adapters extend it."""
    assert run.source is not None
    plan = provider.parallel_plan(run.source.config)
    for adapter in adapters:
        extend = getattr(adapter, "parallel_plan", None)
        plan = plan if extend is None else extend(plan)
    return plan


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
    options: NativeOptions,
) -> TensorParallel | None:
    """Cut the layers, if there are ranks to share them."""
    if grid.tp.size == 1:
        return None
    wanted = options.sequence_parallel
    tp = TensorParallel(grid.tp, plan.sequence if wanted == "auto" else wanted)
    Cutter(plan, tp, grid, shards).cut(model)
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


def _stretches(model: Any, grid: Grid, options: NativeOptions) -> list[range]:
    """The blocks of each stretch of the pipeline, by the sizes of the complete model."""
    sizes = [unpacked_size(block) for block in model.blocks.values()]
    total = grid.pp.size * options.stretches(grid.pp.size)
    ends = unpacked_size(model.embed), unpacked_size(model.head)
    return partition(options.pp_partition, sizes, *ends, total)


def _keys(model: Any) -> list[str]:
    return list(model.blocks)


def _trains(model: Any, stretches: Sequence[range]) -> list[bool]:
    """Whether anything is trained up to the end of each stretch, so that a gradient must reach it."""

    def any_of(modules: Iterable[nn.Module]) -> bool:
        return any(parameter.requires_grad for module in modules for parameter in module.parameters())

    blocks = list(model.blocks.values())
    before = any_of([model.embed])
    own = [any_of(blocks[index] for index in stretch) for stretch in stretches]
    return [before or one for one in accumulate(own, or_)]


def _stages(
    model: Any,
    run: Run,
    ops: Ops,
    grid: Grid,
    stretches: Sequence[range],
    trains: Sequence[bool],
    tp: TensorParallel | None,
    vocabulary: Vocabulary | None,
) -> list[Stage]:
    """This rank's stretches; the model keeps no others."""
    keys, total = _keys(model), len(stretches)
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
                trains_before=number > 0 and trains[number - 1],
                trains=trains[number],
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
    stages: Sequence[Stage],
    names: Mapping[str, str],
    shards: Mapping[str, Shard],
    grid: Grid,
    ends: Collection[str],
) -> dict[str, Shard]:
    """The shards of the parameters that this rank has.

    ends: those that the first and the last stage both have; each gets the sum of both gradients.
    """
    held = {}
    for stage in stages:
        for name, parameter in stage.named_parameters():
            held[names[name]] = replace(shards[names[name]], local=parameter)
    for name in held.keys() & ends:
        assert grid.ends is not None
        held[name] = replace(held[name], sums=(*held[name].sums, grid.ends), copies=held[name].copies * 2)
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


def _make_room(
    model: nn.Module, stages: Sequence[Stage], grid: Grid, options: NativeOptions, given: bool
) -> None:
    """ZeRO, and memory for what is on meta; the buffers that no checkpoint holds have their values then."""
    sharded = options.shards_parameters(grid.dp.size)
    if sharded:
        from collie_core.layouts import zero  # FSDP2 takes a second to import

    for stage in stages:
        if sharded:
            zero.shard(stage, grid, options)
    if given:
        return
    for stage in stages:
        if sharded:
            zero.allocate(stage, grid, options)
            continue
        slots = Slots(stage)
        for name, tensor in list(slots.tensors.items()):
            if name not in slots.copies:
                slots.allocate(name, grid.device, tensor.dtype)
    reset_buffers(model, grid.device)


def _final(shard: Shard, parameter: Any, grid: Grid, sharded: bool) -> Shard:
    """The shard after ZeRO, with the memory that is updated; `sharded`: the parameter is a DTensor."""
    if not sharded:
        sums = shard.sums if grid.dp.group is None else (*shard.sums, grid.dp.group)
        return replace(shard, local=parameter, sums=sums, copies=shard.copies * grid.dp.size)
    local = nn.Parameter(parameter.to_local().detach(), requires_grad=parameter.requires_grad)
    rows = parameter.shape[0]
    begin = min(rows, grid.dp.rank * -(-rows // grid.dp.size))
    shard = replace(shard, local=local)
    return shard if grid.dp.group is None else shard.cut(0, begin, grid.dp.group)
