"""Why a run ended: the message for the user and the exit status, as one process tells the others."""

from __future__ import annotations

import json
import traceback
from dataclasses import asdict, dataclass

from collie_core.errors import CollieError


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
    if isinstance(error, CollieError):
        return str(error), error.exit_status
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", []))
    told = f"{type(error).__name__}: {error}{notes}"
    return f"{told}\n  raised{place}; COLLIE_TRACEBACK=1 shows the whole traceback", 1


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
