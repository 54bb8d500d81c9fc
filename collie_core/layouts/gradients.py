"""Gradients as they become complete: summed over ranks, measured, kept, or handed to a fused optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from collie_core.shard import Shard

if TYPE_CHECKING:
    from collie_core.layouts.grid import Axis

Mode = Literal["accumulate", "keep", "measure", "update"]
Update = Callable[[str, nn.Parameter, Tensor, Tensor], None]


class GradientFlow:
    """A post-accumulate hook on every trainable parameter, armed for the last micro-batch of a pass.

    Unarmed ("accumulate") a gradient adds up, in fp32 whatever the parameter's dtype.  Armed, it is summed
    over the ranks that its shard names, its squared norm is taken, and then "keep" keeps it, "measure" drops
    it, and "update" hands it to the optimizer's `update` and drops it, so that only the few gradients between
    two hooks are ever alive.

    Where gradients are summed over ranks they wait until their unit (a block, say) is complete, and go in the
    order of the parameters: ranks whose hooks fire in another order would add up different parameters.

    Register after the parameters are final: a hook on a parameter that is replaced later never fires.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        shards: Mapping[str, Shard] | None = None,
        world: Axis | None = None,
        hooked: bool = True,
    ) -> None:
        """parameters: those of the module, by name.  shards: this rank's part of each, under the same names.
        world: all ranks, over which the norm is completed.  hooked: false where gradients are still on their
        way to host memory when a hook would fire; they are then taken by `flush`."""
        self.shards = shards or {name: Shard.whole(name, p) for name, p in parameters.items()}
        self.parameters = dict(parameters)
        self.mode: Mode = "accumulate"
        self.finite: Tensor | None = None
        self.update: Update | None = None
        self._world = world
        self._squares: list[Tensor] = []
        self._sums: dict[str, Tensor] = {}
        self._taken: set[str] = set()
        self._waiting: dict[str, dict[str, Tensor]] = {}
        self._under_way: list[_Sum] = []
        self._units: dict[str, list[str]] = {}
        for name, shard in self.shards.items():
            self._units.setdefault(_unit(name) if shard.sums else "", []).append(name)
        for shard in self.shards.values():
            shard.local.grad_dtype = None  # what is computed or summed in fp32 stays so
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._hook(name))
            for name, parameter in self.parameters.items()
            if hooked
        ]

    def arm(self, mode: Mode, finite: Tensor | None = None, update: Update | None = None) -> None:
        """Say what is done with each gradient from now on; `finite` is the loss's flag (0-d bool)."""
        self.mode, self.finite, self.update = mode, finite, update
        self._squares, self._taken = [], set()

    def flush(self) -> None:
        """After the backward pass: take what accumulated and was not taken by a hook, in order."""
        for name, parameter in self.parameters.items():
            if name not in self._taken and (parameter.grad is not None or name in self._sums):
                self._take(name, parameter)
        for unit in list(self._waiting):
            self._complete(unit)
        self._finish()

    def norm(self) -> Tensor:
        """L2 norm (0-d, fp32) of all gradients that became complete since `arm`, over all ranks."""
        total = torch.stack(self._squares).sum() if self._squares else self._zero()
        return (self._world.sum(total) if self._world is not None else total).sqrt()

    def kept(self) -> list[tuple[str, nn.Parameter, Tensor]]:
        """(name, this rank's part, its gradient) of what "keep" kept, in `.grad` of the part."""
        return [
            (name, shard.local, shard.local.grad)
            for name, shard in self.shards.items()
            if shard.local.grad is not None
        ]

    def drop(self) -> None:
        """Free every gradient."""
        for parameter in self.parameters.values():
            parameter.grad = None
        for shard in self.shards.values():
            shard.local.grad = None
        self._sums, self._waiting, self._under_way = {}, {}, []

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _zero(self) -> Tensor:
        device = next((shard.local.device for shard in self.shards.values()), None)
        return torch.zeros((), device=device)

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def complete(parameter: Tensor) -> None:
            if self.mode != "accumulate":
                self._take(name, parameter)
            elif parameter.dtype != torch.float32 and parameter.grad is not None:
                self._sums[name] = self._with_earlier(name, _local(parameter.grad).float())
                parameter.grad = None

        return complete

    def _with_earlier(self, name: str, gradient: Tensor) -> Tensor:
        earlier = self._sums.pop(name, None)
        return gradient if earlier is None else earlier.add_(gradient)

    def _take(self, name: str, parameter: Tensor) -> None:
        """The gradient of this rank's part is there: use it, or let it wait for the rest of its unit."""
        self._taken.add(name)
        if parameter.grad is not None:
            gradient = self._with_earlier(name, _local(parameter.grad))
            parameter.grad = None
        else:
            gradient = self._sums.pop(name)
        if not self.shards[name].sums:
            self._use(name, gradient)
            return
        unit = _unit(name)
        waiting = self._waiting.setdefault(unit, {})
        waiting[name] = gradient
        if len(waiting) == len(self._units[unit]):
            self._complete(unit)

    def _complete(self, unit: str) -> None:
        """Begin to sum the gradients of a unit over the ranks, and use those of the unit before it: a unit's
        sums are under way while the next one's gradients are computed."""
        waiting = self._waiting.pop(unit)
        alike: dict[tuple[dist.ProcessGroup, ...], list[str]] = {}
        for name in self._units[unit]:
            if name in waiting:
                alike.setdefault(self.shards[name].sums, []).append(name)
        begun = [
            _Sum(groups, {name: waiting.pop(name) for name in names}) for groups, names in alike.items()
        ]
        self._finish()
        self._under_way = begun

    def _finish(self) -> None:
        """Use the gradients whose sums are under way."""
        begun, self._under_way = self._under_way, []
        for one in begun:
            for name, gradient in one.wait():
                self._use(name, gradient)

    def _use(self, name: str, gradient: Tensor) -> None:
        """A complete gradient of this rank's box."""
        shard = self.shards[name]
        square = _sum_of_squares(gradient)
        self._squares.append(square / shard.copies if shard.copies > 1 else square)
        if self.mode == "update":
            assert self.update is not None and self.finite is not None
            # the whole parameter is updated or not: one bad element leaves all of it as it was
            whole = shard.sum(square.clone(), range(len(shard.shape))) if shard.cuts else square
            self.update(name, shard.local, gradient, self.finite & torch.isfinite(whole))
        elif self.mode == "keep":
            shard.local.grad = gradient


class _Sum:
    """Gradients that are summed over the same ranks: one buffer in fp32, one all-reduce a group."""

    def __init__(self, groups: tuple[dist.ProcessGroup, ...], gradients: dict[str, Tensor]) -> None:
        self._shapes = {name: gradient.shape for name, gradient in gradients.items()}
        flat = [gradient.reshape(-1).to(torch.float32) for gradient in gradients.values()]
        gradients.clear()
        self._buffer = torch.cat(flat) if len(flat) > 1 else flat[0]
        *first, last = groups
        for group in first:
            dist.all_reduce(self._buffer, group=group)
        self._work = dist.all_reduce(self._buffer, group=last, async_op=True)

    def wait(self) -> Iterator[tuple[str, Tensor]]:
        """(name, sum) of each, in their order."""
        if self._work is not None:
            self._work.wait()
        parts = self._buffer.split([shape.numel() for shape in self._shapes.values()])
        for (name, shape), part in zip(self._shapes.items(), parts, strict=True):
            yield name, part.view(shape)


def _local(gradient: Tensor) -> Tensor:
    """This rank's part of a gradient."""
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _sum_of_squares(gradient: Tensor) -> Tensor:
    """0-d, fp32.  On the CPU row by row: over 768,072 elements at once torch loses five digits."""
    if gradient.device.type == "cpu" and gradient.ndim > 1:
        return torch.linalg.vector_norm(gradient, dim=-1, dtype=torch.float32).square().sum()
    return torch.linalg.vector_norm(gradient, dtype=torch.float32).square()


def _unit(name: str) -> str:
    """What becomes complete together: `blocks.3` of `blocks.3.mlp.up_proj.weight`, or `embed`, or `head`."""
    first, _, rest = name.partition(".")
    return f"{first}.{rest.partition('.')[0]}" if first == "blocks" else first
