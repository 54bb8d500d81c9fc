"""Why a run ended: the message for the user and the exit status, as one process tells the others."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from collie_core.errors import CollieError, OutOfMemory, RunFailed


@dataclass(frozen=True)
class Failure:
    """What ended a process: `rank` is that of the first one that failed, `status` what all exit with."""

    rank: int
    message: str
    status: int

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.message}"

    def to_json(self) -> str:
        """As one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Failure:
        """What `to_json` wrote."""
        return cls(**json.loads(text))


def describe(error: BaseException) -> tuple[str, int]:
    """The message and exit status for an error that ends a command."""
    error = translated(error)
    if isinstance(error, CollieError):
        return str(error), error.exit_status
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", []))
    told = f"{type(error).__name__}: {error}{notes}"
    return f"{told}\n  raised{place}; COLLIE_TRACEBACK=1 shows the whole traceback", 1


def translated(error: BaseException, advice: str = "") -> BaseException:
    """Memory and disk errors as errors for the user, everything else as it is.

    advice: what to do where memory does not suffice.
    """
    if isinstance(error, CollieError):
        return error
    if _no_memory(error):
        first = str(error).splitlines()[0] if str(error) else "allocation failed"
        return OutOfMemory(f"out of memory: {first}{f'. {advice}' if advice else ''}")
    if isinstance(error, OSError) and error.strerror:
        return RunFailed(f"{error.filename or type(error).__name__}: {error.strerror}")
    return error


@contextmanager
def plainly(advice: str) -> Iterator[None]:
    """Within, errors are raised as `translated` tells them."""
    try:
        yield
    except BaseException as error:
        failure = translated(error, advice)
        if failure is error:
            raise
        raise failure from error


#: By what the RuntimeErrors of torch's allocator on the host and of CUDA's libraries tell of memory.
_MEMORY_SIGNS = (
    "DefaultCPUAllocator: can't allocate memory",
    "Cannot allocate memory (12)",
    "not enough memory: you tried",
    "_STATUS_ALLOC_FAILED",
)


def _no_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _MEMORY_SIGNS)


def is_consequence(error: BaseException | None) -> bool:
    """Whether an error says only that a peer went away, so that the peer knows the reason."""
    import torch.distributed as dist

    signs = ("closed by peer", "reset by peer", "gloo", "nccl", "broken pipe")
    while error is not None:
        if isinstance(error, dist.DistError):
            return True
        if isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs):
            return True
        error = error.__cause__
    return False
