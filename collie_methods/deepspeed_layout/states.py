"""Tensors of a DeepSpeed engine under the names of the native layout, for checkpoints and exports.

ZeRO keeps fp32 weights and optimizer states flat, cut among the ranks without regard to parameters.  Here
each is gathered whole, one at a time, by DeepSpeed's own `safe_get_full_*`, and a rank keeps its rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from collie_core.checkpoint.metadata import StoredTensor
from collie_core.checkpoint.store import read_metadata, stream_tensors
from collie_core.errors import CheckpointError
from collie_core.layouts.loss_scale import LossScale
from collie_core.shard import Piece

if TYPE_CHECKING:
    from collie_methods.deepspeed_layout.layout import DeepSpeedLayout

#: name of the fp32 weights behind bf16 ones
MASTER = "layout.master."


class Flat:
    """Which flat fp32 tensor of the optimizer holds (this rank's part of) which parameter, and its states."""

    def __init__(self, engine: Any) -> None:
        zero = engine.optimizer
        self.optimizer: torch.optim.Optimizer = getattr(zero, "optimizer", zero)
        self._linked: list[tuple[list[nn.Parameter], Tensor]] = []
        if hasattr(zero, "fp32_partitioned_groups_flat"):  # ZeRO 3
            groups = list(zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True))
        elif hasattr(zero, "single_partition_of_fp32_groups"):  # ZeRO 1 and 2
            groups = self._linked = list(
                zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True)
            )
        elif hasattr(zero, "fp32_groups_flat_partition"):  # ZeRO 1 in bf16
            groups = self._linked = list(zip(zero.bf16_groups, zero.fp32_groups_flat_partition, strict=True))
        else:  # no ZeRO
            groups = [([p], p) for settings in zero.param_groups for p in settings["params"]]
        self.holders = {id(parameter): flat for parameters, flat in groups for parameter in parameters}

    def link(self) -> None:
        """Let DeepSpeed know which states there are; by itself it links those of the first group alone."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        for parameters, flat in self._linked:
            lazy_init_hp_params_optimizer_state(parameters, flat, self.optimizer.state)

    def states(self, parameter: nn.Parameter) -> tuple[list[str], dict[str, Tensor]]:
        """Names of the states of a parameter's elements, and the states that are one number."""
        flat = self.holders[id(parameter)]
        state = self.optimizer.state.get(flat, {})
        elements = [key for key, value in state.items() if _is_like(value, flat)]
        numbers = {
            key: torch.as_tensor(value, dtype=torch.float32)
            for key, value in state.items()
            if key not in elements and value is not None
        }
        return elements, numbers

    def make(self, parameter: nn.Parameter, elements: list[str], numbers: dict[str, Tensor]) -> None:
        """States without values yet, as the first step would make them, and numbers with theirs."""
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        flat = self.holders[id(parameter)]
        state = self.optimizer.state[flat]
        for key in elements:
            if key not in state:
                state[key] = torch.zeros_like(flat.detach())
        for key, value in numbers.items():
            counts = isinstance(self.optimizer, DeepSpeedCPUAdam)
            state[key] = int(value) if counts else value.clone()


def _is_like(value: Any, flat: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == flat.shape


def state_of(layout: DeepSpeedLayout) -> dict[str, Tensor | Piece]:
    """`model.*`, `optimizer.*` and `layout.master.*`; all ranks ask together.

    A rank holds rows of each tensor that is cut, copied to the host.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    placed, flat = layout.placed, Flat(layout.engine)
    flat.link()
    kept = _kept(layout)
    state: dict[str, Tensor | Piece] = {
        f"model.{name}": tensor for name, tensor in placed.buffers.items() if name in kept
    }
    # what the native layout looks for; of these dtypes it is never scaled
    scale = LossScale(getattr(torch, layout.run.config.model.dtype))
    state |= {f"layout.{name}": tensor for name, tensor in scale.state_dict().items()}
    for name, parameter in placed.parameters.items():
        if name not in kept:
            continue
        if layout.partitioned:
            with layout.gathered(parameter):
                state[f"model.{name}"] = _rows(layout, parameter.detach())
        else:
            state[f"model.{name}"] = parameter.detach()
        if not parameter.requires_grad:
            continue
        elements, numbers = flat.states(parameter)
        state |= {f"optimizer.{name}.{key}": value for key, value in numbers.items()}
        if layout.zero_stage == 0:
            own = flat.optimizer.state[parameter]
            state |= {f"optimizer.{name}.{key}": own[key] for key in elements}
            continue
        for key in elements:
            whole = safe_get_full_optimizer_state(parameter, key)
            state[f"optimizer.{name}.{key}"] = _rows(layout, whole)
        if parameter.dtype != torch.float32:
            state[f"{MASTER}{name}"] = _rows(layout, safe_get_full_fp32_param(parameter))
    return state


def _kept(layout: DeepSpeedLayout) -> Collection[str]:
    """What of the model a checkpoint holds: where there are adapters, what they added."""
    return layout.run.added or layout.placed.whole_shapes


def _rows(layout: DeepSpeedLayout, whole: Tensor) -> Tensor | Piece:
    """This rank's rows of a gathered tensor, as a copy of their own on the host."""
    if not whole.ndim:
        return whole.detach().to("cpu", copy=True)
    count = -(-whole.shape[0] // layout.dp_size)
    begin = min(whole.shape[0], layout.run.rank * count)
    own = whole.detach()[begin : begin + count].to("cpu", copy=True)
    return Piece(own, tuple(whole.shape), (begin, *(0,) * (whole.ndim - 1)))


def load_state(layout: DeepSpeedLayout, folder: Path) -> None:
    """Fill weights, and the optimizer's states, from a checkpoint written under any layout.

    Every rank reads every tensor, one at a time.  Raises CheckpointError, with nothing changed, where names,
    shapes or dtypes differ.
    """
    stored = read_metadata(folder).tensors
    _refuse_misfits(layout, stored, folder)
    parameters = layout.placed.parameters
    kept = _kept(layout)
    tensors: dict[str, Tensor] = {
        name: t for name, t in {**layout.placed.buffers, **parameters}.items() if name in kept
    }
    for full_name, value in stream_tensors(folder, [f"model.{name}" for name in tensors]):
        target = tensors[full_name.removeprefix("model.")]
        with layout.gathered(target) if isinstance(target, nn.Parameter) else nullcontext():
            if target.numel():  # under ZeRO 3 gathered, and sent on by rank 0
                target.detach().copy_(value)
    if layout.trains:
        _load_optimizer(layout, folder, stored)


def _load_optimizer(layout: DeepSpeedLayout, folder: Path, stored: dict[str, StoredTensor]) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    flat = Flat(layout.engine)
    trained = {name: p for name, p in layout.placed.parameters.items() if p.requires_grad}
    keys: dict[str, list[str]] = {}
    for name, parameter in trained.items():
        prefix, shape = f"optimizer.{name}.", layout.placed.whole_shapes[name]
        found = [key for key in stored if key.startswith(prefix) and "." not in key[len(prefix) :]]
        keys[name] = [key for key in found if tuple(stored[key].shape) == tuple(shape)]
        others = [key for key in found if key not in keys[name]]
        numbers = {key[len(prefix) :]: value for key, value in stream_tensors(folder, others)}
        flat.make(parameter, [key[len(prefix) :] for key in keys[name]], numbers)
    flat.link()
    for name, parameter in trained.items():
        if layout.zero_stage:
            source = f"{MASTER}{name}" if f"{MASTER}{name}" in stored else f"model.{name}"
            [(_, value)] = stream_tensors(folder, [source])
            safe_set_full_fp32_param(parameter, value.float())
        for key, value in stream_tensors(folder, keys[name]):
            short = key.rpartition(".")[2]
            if layout.zero_stage:
                safe_set_full_optimizer_state(parameter, value, short)
            else:
                flat.optimizer.state[parameter][short].copy_(value)


def _refuse_misfits(layout: DeepSpeedLayout, stored: dict[str, StoredTensor], folder: Path) -> None:
    problems = []
    for name in _kept(layout):
        shape = layout.placed.whole_shapes[name]
        own = layout.placed.buffers.get(name, layout.placed.parameters.get(name))
        found = stored.get(f"model.{name}")
        if found is None:
            problems.append(f"model.{name} is missing")
        elif own is not None and (tuple(found.shape), found.torch_dtype) != (tuple(shape), own.dtype):
            has = f"{list(found.shape)} {found.torch_dtype}"
            problems.append(f"model.{name} is {has}, expected {list(shape)} {own.dtype}")
    for name in stored:
        parameter = name.removeprefix("optimizer.").rpartition(".")[0]
        if name.startswith("optimizer.") and parameter not in layout.placed.parameters:
            problems.append(f"{name} belongs to no parameter that is trained")
    if problems:
        more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise CheckpointError(f"{folder} does not fit: {'; '.join(problems[:20])}{more}")


def full_tensors(
    layout: DeepSpeedLayout, names: Collection[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) in the model's order, one gathered at a time; empty on other ranks than 0."""
    placed = layout.placed
    for name in placed.whole_shapes:
        if names is not None and name not in names:
            continue
        tensor = placed.buffers[name] if name in placed.buffers else placed.parameters[name]
        with layout.gathered(tensor) if isinstance(tensor, nn.Parameter) else nullcontext():
            first = tensor.detach()
            if not layout.run.first:
                first = torch.empty(0, dtype=tensor.dtype)
            elif layout.partitioned:
                first = first.to("cpu", copy=True)
        yield name, first
