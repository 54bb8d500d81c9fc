"""Gradients as they become complete: summed over ranks, measured, kept, or handed to a fused optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from collie_core.layouts.ties import part_of
from collie_core.ops import norm_triton
from collie_core.optimizers.gradients import sum_of_squares
from collie_core.shard import Shard

if TYPE_CHECKING:
    from collie_core.layouts.grid import Axis

Mode = Literal["accumulate", "keep", "measure", "update"]
Unit = tuple[bool, str]  # whether it is summed over ranks, and which parameters it has


class Updates(Protocol):
    """What an optimizer has that updates inside the backward pass; see `collie_core.hookspecs.Optimizer`."""

    def update(self, name: str, parameter: nn.Parameter, gradient: Tensor, finite: Tensor) -> None:
        """`update_together` is called instead where it is there."""


class GradientFlow:
    """A post-accumulate hook on every trainable parameter, armed for the last micro-batch of a pass.

    Unarmed ("accumulate") a gradient adds up, in fp32 whatever the parameter's dtype.  Armed, it is summed
    over the ranks that its shard names, its squared norm is taken, and then "keep" keeps it, "measure" drops
    it, and "update" hands it to the optimizer and drops it, so that only the few gradients between
    two hooks are ever alive, or those of one block where they come `together`.

    Where gradients are summed over ranks they wait until their unit (a block, say) is complete, and units go
    from the last to the first: ranks whose hooks fire in another order would add up different parameters.
    One of which a parameter has no gradient here waits, with all that come after it, for `flush`; there the
    parameter counts as zero, unless no rank has a gradient of it: it then has none.

    Register after the parameters are final: a hook on a parameter that is replaced later never fires.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        shards: Mapping[str, Shard] | None = None,
        world: Axis | None = None,
        hooked: bool = True,
        together: bool = False,
        device: torch.device | None = None,
        visible: bool = False,
    ) -> None:
        """parameters: those of the module, by name.  shards: this rank's part of each, under the same names.
        world: all ranks, over which the norm is completed.  hooked: false where gradients are still on their
        way to host memory when a hook would fire; they are then taken by `flush`.  together: those of a block
        become complete at the same time, so that no memory is saved by using one before the others are there.
        device: where gradients are when they are used, for a rank that trains nothing.  visible: what
        accumulates is in `.grad`, where all find it and `zero_grad` drops it."""
        self.shards = shards or {name: Shard.whole(name, p) for name, p in parameters.items()}
        self.parameters = dict(parameters)
        self.mode: Mode = "accumulate"
        self.finite: Tensor | None = None
        self.optimizer: Updates | None = None
        self._world, self._device, self._visible = world, device, visible
        self._squares: list[Tensor] = []
        self._sums: dict[str, Tensor] = {}
        self._taken: set[str] = set()
        self._waiting: dict[Unit, dict[str, Tensor]] = {}
        self._under_way: list[_Sum] = []
        self._unit_of: dict[str, Unit] = {
            name: (bool(shard.sums), part_of(name) if shard.sums or together else name)
            for name, shard in self.shards.items()
        }
        self._units: dict[Unit, list[str]] = {}  # in the order in which they are summed
        for name, unit in reversed(self._unit_of.items()):
            self._units.setdefault(unit, []).insert(0, name)
        self._left: list[Unit] = []  # of those that are summed
        for shard in self.shards.values():
            shard.local.grad_dtype = None  # what is computed or summed in fp32 stays so
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._hook(name))
            for name, parameter in self.parameters.items()
            if hooked
        ]

    def arm(self, mode: Mode, finite: Tensor | None = None, optimizer: Updates | None = None) -> None:
        """Say what is done with each gradient from now on; `finite` is the loss's flag (0-d bool)."""
        self.mode, self.finite, self.optimizer = mode, finite, optimizer
        self._squares, self._taken = [], set()
        self._waiting = {unit: {} for unit in self._units}
        self._left = [unit for unit in self._units if unit[0]]

    def collect(self) -> None:
        """After a backward pass in which no hook fired: add what it gave to the sums, in fp32."""
        for name, parameter in self.parameters.items():
            self._accumulate(name, parameter)

    def flush(self) -> None:
        """After the backward pass: take what accumulated and was not taken by a hook, in order."""
        for name, parameter in self.parameters.items():
            if name not in self._taken and (parameter.grad is not None or name in self._sums):
                self._take(name, parameter)
        while self._left:
            self._sum(self._left.pop(0))
        self._finish()
        for waiting in self._waiting.values():
            self._use(waiting)
        self._waiting = {}

    @contextmanager
    def earlier_kept(self) -> Iterator[None]:
        """Within, where gradients are visible, what accumulated before counts, and is there again after."""
        earlier = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        for name in earlier:
            self.parameters[name].grad = None
        self._sums = dict(earlier)
        try:
            yield
        finally:
            self._sums = {}
            for name, gradient in earlier.items():
                self.parameters[name].grad = gradient

    def norm(self) -> Tensor:
        """L2 norm (0-d, fp32) of all gradients that became complete since `arm`, over all ranks."""
        total = torch.cat(self._squares).sum() if self._squares else self._zero()
        return (self._world.sum(total) if self._world is not None else total).sqrt()

    def kept(self) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """(name, this rank's part, its gradient) of what "keep" kept, in `.grad` of the part."""
        for name, shard in self.shards.items():
            if shard.local.grad is not None:
                yield name, shard.local, shard.local.grad

    def drop(self) -> None:
        """Free every gradient."""
        for parameter in self.parameters.values():
            parameter.grad = None
        for shard in self.shards.values():
            shard.local.grad = None
        self._sums, self._waiting, self._under_way, self._left = {}, {}, [], []

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _zero(self) -> Tensor:
        device = next((shard.local.device for shard in self.shards.values()), self._device)
        return torch.zeros((), device=device)

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def complete(parameter: Tensor) -> None:
            if self.mode != "accumulate":
                self._take(name, parameter)
            else:
                self._accumulate(name, parameter)

        return complete

    def _accumulate(self, name: str, parameter: Tensor) -> None:
        if parameter.dtype == torch.float32 or parameter.grad is None:
            return
        if self._visible:
            parameter.grad = parameter.grad.float()
        else:
            self._sums[name] = self._with_earlier(name, _local(parameter.grad).float())
            parameter.grad = None

    def _with_earlier(self, name: str, gradient: Tensor) -> Tensor:
        earlier = self._sums.pop(name, None)
        if earlier is None:
            return gradient
        return earlier + gradient if self._visible else earlier.add_(gradient)

    def _take(self, name: str, parameter: Tensor) -> None:
        """The gradient of this rank's part is there: use it, or let it wait for the rest of its unit."""
        self._taken.add(name)
        if parameter.grad is not None:
            gradient = self._with_earlier(name, _local(parameter.grad))
            parameter.grad = None
        else:
            gradient = self._sums.pop(name)
        unit = self._unit_of[name]
        self._waiting[unit][name] = gradient
        if not unit[0] and self._complete(unit):
            self._use(self._waiting.pop(unit))
        while self._left and self._complete(self._left[0]):
            self._sum(self._left.pop(0))

    def _complete(self, unit: Unit) -> bool:
        return len(self._waiting[unit]) == len(self._units[unit])

    def _sum(self, unit: Unit) -> None:
        """Begin to sum the gradients of a unit over the ranks.  Those of the unit before are used now: a
        unit's sums are under way while the next one's gradients are computed.  Where all are kept anyway,
        none is waited for before `flush`."""
        waiting = self._waiting.pop(unit)
        alike: dict[tuple[dist.ProcessGroup, ...], list[Shard]] = {}
        for name in self._units[unit]:
            alike.setdefault(self.shards[name].sums, []).append(self.shards[name])
        begun = [_Sum(groups, shards, waiting) for groups, shards in alike.items()]
        if self.mode != "keep":
            self._finish()
        self._under_way += begun

    def _finish(self) -> None:
        """Use the gradients whose sums are under way."""
        begun, self._under_way = self._under_way, []
        for one in begun:
            self._use(dict(one.wait()))

    def _use(self, gradients: Mapping[str, Tensor]) -> None:
        """Complete gradients of this rank's boxes."""
        if not gradients:
            return
        shards, tensors = [self.shards[name] for name in gradients], list(gradients.values())
        finite = self.finite if self.mode == "update" else None
        if norm_triton.serves(tensors):
            squares, flags = norm_triton.squares(tensors, finite)
        else:
            squares, flags = torch.stack([sum_of_squares(tensor) for tensor in tensors]), None
        self._squares.append(_of_one_copy(squares, shards))
        if finite is not None:
            # the whole parameter is updated or not: one bad element leaves all of it as it was
            cut = any(shard.cuts for shard in shards)
            if flags is None or cut:
                flags = finite & torch.isfinite(_of_whole(squares, shards) if cut else squares)
            self._update(gradients, flags)
        elif self.mode == "keep":
            for name, gradient in gradients.items():
                self.shards[name].local.grad = gradient

    def _update(self, gradients: Mapping[str, Tensor], flags: Tensor) -> None:
        assert self.optimizer is not None
        complete = [(name, self.shards[name].local, gradient) for name, gradient in gradients.items()]
        together = getattr(self.optimizer, "update_together", None)
        if together is not None:
            together(complete, flags)
            return
        for (name, parameter, gradient), flag in zip(complete, flags.unbind(), strict=True):
            self.optimizer.update(name, parameter, gradient, flag)


def _of_one_copy(squares: Tensor, shards: Sequence[Shard]) -> Tensor:
    """What each box adds to the norm, which all ranks that hold it add up."""
    copies = [shard.copies for shard in shards]
    if len(set(copies)) == 1:
        return squares / copies[0] if copies[0] > 1 else squares
    return torch.stack([square / n for square, n in zip(squares.unbind(), copies, strict=True)])


def _of_whole(squares: Tensor, shards: Sequence[Shard]) -> Tensor:
    """The boxes' sums of squares, (n,), completed to those of the whole parameters; collective."""
    parts = list(squares.unbind())
    alike: dict[tuple[dist.ProcessGroup, ...], list[int]] = {}
    for index, shard in enumerate(shards):
        alike.setdefault(tuple(group for _, group in shard.cuts), []).append(index)
    for places in alike.values():
        one = shards[places[0]]
        whole = one.sum(torch.stack([parts[place] for place in places]), range(len(one.shape)))
        for place, square in zip(places, whole.unbind(), strict=True):
            parts[place] = square
    return torch.stack(parts)


class _Sum:
    """Gradients that are summed over the same ranks: one buffer in fp32, one all-reduce a group.

    It ends with the number of ranks that have each, which those ask for that do not.
    """

    def __init__(
        self, groups: tuple[dist.ProcessGroup, ...], shards: list[Shard], gradients: dict[str, Tensor]
    ) -> None:
        """gradients: of some of the shards; they are taken out."""
        self._shards = shards
        sizes = [shard.local.numel() for shard in shards]
        local = shards[0].local
        self._buffer = torch.empty(sum(sizes) + len(sizes), dtype=torch.float32, device=local.device)
        *self._parts, self._having = self._buffer.split([*sizes, len(sizes)])
        self._having.fill_(1.0)
        self._missing = {shard.name for shard in shards} - gradients.keys()
        for index, (shard, part) in enumerate(zip(shards, self._parts, strict=True)):
            if shard.name in self._missing:
                part.zero_()
                self._having[index].zero_()
            else:
                part.copy_(gradients.pop(shard.name).reshape(-1))
        *first, last = groups
        for group in first:
            dist.all_reduce(self._buffer, group=group)
        self._work = dist.all_reduce(self._buffer, group=last, async_op=True)

    def wait(self) -> Iterator[tuple[str, Tensor]]:
        """(name, sum) of each that some rank has, in their order."""
        if self._work is not None:
            self._work.wait()
        for index, (shard, part) in enumerate(zip(self._shards, self._parts, strict=True)):
            if shard.name not in self._missing or bool(self._having[index] > 0):
                yield shard.name, part.view(shard.local.shape)


def _local(gradient: Tensor) -> Tensor:
    """This rank's part of a gradient."""
    part = getattr(gradient, "to_local", None)  # a DTensor's, which takes a second to import
    return gradient if part is None else part()
