"""Finding and opening checkpoints: which folder is one, which is the newest whole one."""

from __future__ import annotations

import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collie_core.checkpoint.manifest import MANIFEST_FILE, Verify, verify
from collie_core.errors import CheckpointError

CHECKPOINTS = "checkpoints"
STATE_FILE = "state.json"

_STEP_NAME = re.compile(r"step_(\d{6,})")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its folder and the number of optimizer steps done."""

    path: Path
    step: int

    def state(self) -> dict[str, Any]:
        """The JSON object that was saved beside the tensors."""
        return read_state(self.path)


def step_name(step: int) -> str:
    """`step_000010`."""
    return f"step_{step:06d}"


def step_of(folder: Path) -> int | None:
    """The step in a checkpoint folder's name; None for any other name."""
    match = _STEP_NAME.fullmatch(folder.name)
    return int(match[1]) if match and folder.name == step_name(int(match[1])) else None


def step_folders(checkpoints: Path) -> dict[int, Path]:
    """step -> folder of everything named like a checkpoint, whole or not, newest first."""
    paths = [path for path in checkpoints.iterdir() if path.is_dir()] if checkpoints.is_dir() else []
    found = {step: path for path in paths if (step := step_of(path)) is not None}
    return dict(sorted(found.items(), reverse=True))


def find_latest(output_dir: str | os.PathLike[str], mode: Verify = "full") -> Checkpoint | None:
    """The newest whole checkpoint of a run folder; a warning names each that is passed over, and why."""
    for path in step_folders(Path(output_dir) / CHECKPOINTS).values():
        try:
            return Checkpoint(path, verify(path, mode).step)
        except CheckpointError as error:
            _log.warning("checkpoint %s is passed over: %s", path, error)
    return None


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a checkpoint, whole or damaged, or a run folder that has some."""
    path = Path(path)
    if step_folders(path / CHECKPOINTS) or (path.is_dir() and step_of(path) is not None):
        return True
    manifest = path / MANIFEST_FILE
    return manifest.is_file() and b"collie-checkpoint" in manifest.read_bytes()


def open_checkpoint(path: str | os.PathLike[str], mode: Verify = "full") -> Checkpoint:
    """The checkpoint at `path`, or the newest whole one of the run folder `path`.

    Raises CheckpointError: for a damaged checkpoint with the cause and the nearest whole one beside it.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} is no folder")
    if not is_checkpoint(path):
        raise CheckpointError(f"{path} is neither a checkpoint nor a run folder with checkpoints")
    if step_folders(path / CHECKPOINTS):
        latest = find_latest(path, mode)
        if latest is None:
            raise CheckpointError(f"{path}: none of its checkpoints is whole")
        return latest
    try:
        return Checkpoint(path, verify(path, mode).step)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {_nearest_whole(path, mode)}") from error


def read_state(folder: Path) -> dict[str, Any]:
    """The contents of `state.json`; raises CheckpointError if it is no strict JSON object."""
    path = folder / STATE_FILE
    try:
        state = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return state


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _nearest_whole(damaged: Path, mode: Verify) -> str:
    """Which other checkpoint of the same run can be used: the newest older one, else the oldest newer one."""
    folders = step_folders(damaged.parent)
    step = step_of(damaged) or 0
    older = [path for other, path in folders.items() if other < step]
    newer = [path for other, path in reversed(folders.items()) if other > step]
    for path in older + newer:
        try:
            verify(path, mode)
        except CheckpointError:
            continue
        return f"{path} is whole"
    return "there is no whole checkpoint beside it"
