"""ZeRO by FSDP2 (Rajbhandari et al. 2020, arXiv 1910.02054; Zhao et al. 2023, arXiv 2304.11277)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from collie_core.errors import ConfigError
from collie_core.models.buffers import made_buffers, persistent_buffers

if TYPE_CHECKING:
    from collie_core.layouts.grid import Grid
    from collie_core.layouts.options import NativeOptions
    from collie_core.layouts.stage import Stage


def shard(stage: Stage, grid: Grid, options: NativeOptions) -> None:
    """Cut every parameter of a stage among the data-parallel ranks.

    Each block is a unit, gathered when it runs; the rest of the stage is one more.
    Raises ConfigError for a parameter without dimensions, which cannot be cut.
    """
    for name, parameter in stage.named_parameters():
        if parameter.ndim == 0:
            key = "offload: none and zero_stage: 0" if options.offload == "cpu" else "zero_stage: 0"
            raise ConfigError(f"layout: ZeRO cannot cut {name}, a parameter without dimensions; set {key}")
    low = next(stage.parameters()).dtype != torch.float32
    pinned = grid.device.type == "cuda"
    offload = CPUOffloadPolicy(pin_memory=pinned) if options.offload == "cpu" else OffloadPolicy()

    def unit(module: nn.Module, reshard: bool) -> None:
        fully_shard(
            module,
            mesh=grid.data_mesh(),
            reshard_after_forward=reshard,
            mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32 if low else None),
            offload_policy=offload,
        )

    _pass_as_floats(stage)
    gathered_anew = options.zero_stage == 3
    for block in stage.blocks.values():
        unit(block, gathered_anew)
    tied = stage.embed is not None and stage.head is not None and (
        {id(p) for p in stage.embed.parameters()} & {id(p) for p in stage.head.parameters()}
    )
    if stage.embed is not None and not tied:
        unit(stage.embed, gathered_anew)
    unit(stage, False)  # what is used at the end of forward and the beginning of backward
    register_fsdp_forward_method(stage, "next_logits")
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the loss is divided by the tokens of all ranks
            module.set_force_sum_reduction_for_comms(True)


def _pass_as_floats(module: nn.Module) -> None:
    """Packed weights as float8 of the same bytes: FSDP2 of torch 2.11 takes no parameters of integers."""
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if parameter.dtype == torch.uint8:
                floats = parameter.detach().view(torch.float8_e5m2)
                setattr(owner, name, nn.Parameter(floats, requires_grad=False))


def allocate(stage: Stage, grid: Grid, options: NativeOptions) -> None:
    """Memory for the parameters, in host memory under offload, and for persistent buffers, on the device.

    Buffers that no checkpoint holds stay on meta, for the module to make them.
    """
    device = torch.device("cpu") if options.offload == "cpu" else grid.device
    made = made_buffers(stage)
    stage.to_empty(device=device)
    for owner, leaf, buffer in made:
        setattr(owner, leaf, buffer)
    for name, buffer in persistent_buffers(stage).items():
        path, _, leaf = name.rpartition(".")
        setattr(stage.get_submodule(path), leaf, buffer.to(grid.device))
    for module in stage.modules():
        if isinstance(module, FSDPModule) and (device != grid.device or _uneven(module)):
            module.unshard()  # lets FSDP2 move shards that it pads or pins to where they stay
            module.reshard()


def _uneven(module: nn.Module) -> bool:
    """Whether the ranks have different numbers of rows of some parameter."""
    return any(
        parameter.shape[0] % parameter.device_mesh.size()
        for parameter in module.parameters()
        if isinstance(parameter, DTensor)
    )
