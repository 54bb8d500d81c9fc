"""What all processes of a run do together around the layout: share values, fail together.

Each takes the process group to talk in (None: the default group), and is a plain call on one process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


def distributed() -> bool:
    """True where this process is one of several."""
    return dist.is_available() and dist.is_initialized()


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
    _raise_first(error, gather(error, group))
    return result  # type: ignore[return-value]


def from_first(action: Callable[[], T], group: ProcessGroup | None = None) -> T:
    """What `action` returns on rank 0, which alone runs it; its error is raised on every rank."""
    if not distributed():
        return action()
    outcome = _attempt(action) if dist.get_rank() == 0 else (None, None)
    shared: list[Any] = [outcome]
    dist.broadcast_object_list(shared, 0, group=group)
    result, error = shared[0]
    _raise_first(outcome[1], [error])
    found: Any = outcome[0] if dist.get_rank() == 0 else result
    return found


def from_first_on_node(action: Callable[[], T], group: ProcessGroup | None = None) -> T:
    """What `action` returns on the first process of this machine; see `from_first`."""
    if not distributed():
        return action()
    local_rank = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
    outcome = _attempt(action) if local_rank == 0 else (None, None)
    everyone = gather(outcome, group)
    _raise_first(outcome[1], [error for _, error in everyone])
    result: Any = everyone[dist.get_rank() - local_rank][0]
    return result


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


def _raise_first(own: BaseException | None, errors: Sequence[BaseException | None]) -> None:
    """Raise the own error, which has its traceback, or else the first of the others."""
    if own is not None:
        raise own
    for error in errors:
        if error is not None:
            raise error
