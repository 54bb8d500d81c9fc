"""What all processes of a run do together around the layout: share values, fail together.

Each takes the process group to talk in (None: the default group), and is a plain call on one process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from collie_core.errors import CollieError
from collie_core.launch.failure import describe
from collie_core.launch.world import machine

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


def distributed() -> bool:
    """True where this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def first() -> bool:
    """True on the one process that does what is done once."""
    return not distributed() or dist.get_rank() == 0


def gather(value: T, group: ProcessGroup | None = None) -> list[T]:
    """The values of all ranks."""
    if not distributed():
        return [value]
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found


def together(action: Callable[[], T], group: ProcessGroup | None = None) -> T:
    """What `action` returns here; where it fails on any rank, an error of it is raised on every rank."""
    if not distributed():
        return action()
    result, error = _attempt(action)
    _raise_first(error, gather(_sendable(error), group))
    return result  # type: ignore[return-value]


def from_first(action: Callable[[], T], group: ProcessGroup | None = None) -> T:
    """What `action` returns on rank 0, which alone runs it; its error is raised on every rank."""
    if not distributed():
        return action()
    result, error = _attempt(action) if dist.get_rank() == 0 else (None, None)
    shared: list[Any] = [(result, _sendable(error))]
    dist.broadcast_object_list(shared, 0, group=group)
    _raise_first(error, [shared[0][1]])
    found: Any = result if dist.get_rank() == 0 else shared[0][0]
    return found


def from_first_on_node(action: Callable[[], T], group: ProcessGroup | None = None) -> T:
    """What `action` returns on the first process of this machine; see `from_first`."""
    if not distributed():
        return action()
    holder = gather(machine(), group).index(machine())
    mine = dist.get_rank(group) == holder
    result, error = _attempt(action) if mine else (None, None)
    everyone = gather((result, _sendable(error)), group)
    _raise_first(error, [other for _, other in everyone])
    found: Any = result if mine else everyone[holder][0]
    return found


def highest(values: Sequence[float], group: ProcessGroup | None = None) -> list[float]:
    """For each position the highest value of any rank."""
    if not distributed():
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group=group)
    found: list[float] = tensor.tolist()
    return found


def _attempt(action: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    try:
        return action(), None
    except (Exception, KeyboardInterrupt) as error:
        return None, error


def _sendable(error: BaseException | None) -> BaseException | None:
    """The error, or, where another process could not make it again, one with its text and exit status."""
    if error is None or "__reduce__" in vars(type(error)):
        return error
    plain = type(error).__module__ in ("builtins", "collie_core.errors")
    values = [*error.args, *vars(error).values()]
    if plain and all(isinstance(value, str | int | float | None) for value in values):
        return error
    text, status = describe(error)
    sent = CollieError(text)
    sent.exit_status = status
    return sent


def _raise_first(own: BaseException | None, errors: Sequence[BaseException | None]) -> None:
    """Raise the own error, which has its traceback, or else the first of the others."""
    if own is not None:
        raise own
    for error in errors:
        if error is not None:
            raise error
