"""A layout's tensors for checkpoints and exports, whichever ranks hold them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from collie_core.checkpoint.store import load_tensors, read_metadata
from collie_core.shard import Piece

if TYPE_CHECKING:
    from collie_core.checkpoint.metadata import StoredTensor
    from collie_core.layouts.native import NativeLayout


def state_of(layout: NativeLayout) -> dict[str, Tensor | Piece]:
    """`model.*`, `optimizer.*`, `layout.*`: live tensors of this rank, and pieces of those that are cut.

    Where there are adapters, `model.*` is what they added: the rest is in the model that they are for.
    """
    placed, added = layout.placed, layout.run.added
    state: dict[str, Tensor | Piece] = {
        f"model.{name}": shard.piece(shard.local.detach())
        for name, shard in placed.shards.items()
        if not added or name in added
    }
    if not added:
        state |= {f"model.{name}": buffer for name, buffer in placed.buffers.items()}
    if layout.optimizer is not None:
        for name, value in layout.optimizer.state_dict().items():
            state[f"optimizer.{name}"] = _as_piece(layout, name, value)
        state |= {f"layout.{name}": tensor for name, tensor in layout.loss_scale.state_dict().items()}
    return state


def load_state(layout: NativeLayout, folder: Path) -> None:
    """Fill model, optimizer and loss scale, each rank reading its pieces.  Raises CheckpointError."""
    group = layout.grid.control
    if layout.placed.read_from != folder:
        state = {name: value for name, value in state_of(layout).items() if name.startswith("model.")}
        load_tensors(state, folder, process_group=group)
    if layout.optimizer is None:
        return
    live = layout.optimizer.state_dict()
    scale = layout.loss_scale.state_dict()
    wanted: dict[str, Tensor | Piece] = {f"layout.{name}": tensor for name, tensor in scale.items()}
    for full_name, found in read_metadata(folder).tensors.items():
        name = full_name.removeprefix("optimizer.")
        if full_name != name and not _elsewhere(layout, name.rpartition(".")[0]):
            wanted[full_name] = _to_fill(layout, name, found, live.get(name))
    load_tensors(wanted, folder, process_group=group)
    layout.loss_scale.load_state_dict({name: Piece.of(wanted[f"layout.{name}"]).local for name in scale})
    layout.optimizer.load_state_dict(
        {
            name.removeprefix("optimizer."): Piece.of(value).local
            for name, value in wanted.items()
            if name.startswith("optimizer.")
        }
    )


def _to_fill(
    layout: NativeLayout, name: str, found: StoredTensor, live: Tensor | Piece | None
) -> Tensor | Piece:
    """Where to put this rank's part of an optimizer's state: the live one if it is alike, else a new one."""
    if live is not None:
        like = _as_piece(layout, name, live)
        if Piece.of(like).local.dtype == found.torch_dtype:
            return like
        empty = torch.empty_like(Piece.of(like).local, dtype=found.torch_dtype)
        return Piece(empty, like.shape, like.offsets) if isinstance(like, Piece) else empty
    shard = layout.placed.shards.get(name.rpartition(".")[0])
    if shard is not None and tuple(found.shape) == shard.shape:
        return shard.piece(torch.empty(shard.local.shape, dtype=found.torch_dtype))
    return torch.empty(tuple(found.shape), dtype=found.torch_dtype)  # the optimizer says if it has no place


def full_tensors(
    layout: NativeLayout, names: Collection[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) in the model's order; on other ranks than 0 an empty tensor in its place.

    One tensor at a time is gathered to rank 0, from one holder of each box.
    """
    placed, grid = layout.placed, layout.grid
    local: dict[str, Tensor | Piece] = {
        name: shard.piece(shard.local.detach()) for name, shard in placed.shards.items()
    }
    local |= placed.buffers
    wanted = [name for name in placed.whole_shapes if names is None or name in names]
    if grid.world.group is None:
        for name in wanted:
            yield name, Piece.of(local[name]).local
        return
    pieces = {name: Piece.of(value) for name, value in local.items()}
    boxes = {
        name: (piece.offsets, tuple(piece.local.shape), piece.local.dtype) for name, piece in pieces.items()
    }
    everyone: list[dict[str, tuple[tuple[int, ...], tuple[int, ...], torch.dtype]]] = [
        {} for _ in range(grid.world.size)
    ]
    dist.all_gather_object(everyone, boxes, group=grid.control)
    for name in wanted:
        shape = placed.whole_shapes[name]
        holders = {
            one[name][:2]: rank
            for rank, one in reversed(list(enumerate(everyone)))
            if name in one and (0 not in one[name][1] or 0 in shape)
        }
        dtype = next(one[name][2] for one in everyone if name in one)
        yield name, _gathered(layout, pieces.get(name), holders, shape, dtype)


def _gathered(
    layout: NativeLayout,
    own: Piece | None,
    holders: dict[tuple[tuple[int, ...], tuple[int, ...]], int],
    shape: torch.Size,
    dtype: torch.dtype,
) -> Tensor:
    rank, control = layout.grid.world.rank, layout.grid.control
    if rank != 0:
        for box, holder in holders.items():
            if holder == rank and own is not None and box == (own.offsets, tuple(own.local.shape)):
                dist.send(own.local.to("cpu").contiguous(), 0, group=control)
        return torch.empty(0, dtype=dtype)
    whole = torch.empty(shape, dtype=dtype)
    for (offsets, sizes), holder in holders.items():
        place = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
        if holder == 0:
            assert own is not None
            whole[place] = own.local.to("cpu")
        else:
            part = torch.empty(sizes, dtype=dtype)
            dist.recv(part, holder, group=control)
            whole[place] = part
    return whole


def _as_piece(layout: NativeLayout, name: str, value: Tensor | Piece) -> Tensor | Piece:
    """A state of the shape of its parameter is cut like it; an optimizer says itself of any other."""
    shard = layout.placed.shards.get(name.rpartition(".")[0])
    if isinstance(value, Piece) or shard is None or not shard.shape or value.shape != shard.local.shape:
        return value
    return shard.piece(value)


def _elsewhere(layout: NativeLayout, name: str) -> bool:
    """True for a parameter that another stage alone has."""
    placed = layout.placed
    return layout.grid.pp.size > 1 and name in placed.whole_shapes and name not in placed.shards
