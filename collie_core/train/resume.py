"""The output folder of a run, held by a lock, and the checkpoint in it from which the run goes on."""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collie_core.config.checks import resume_differences
from collie_core.config.problems import ConfigProblems
from collie_core.errors import CheckpointError, UserError
from collie_core.files import OutputLock
from collie_core.together import from_first

if TYPE_CHECKING:
    from collie_core.checkpoint.folder import Checkpoint
    from collie_core.checkpoint.manager import CheckpointManager
    from collie_core.config.schema import CollieConfig
    from collie_core.data.dataset import TokenizedDataset
    from collie_core.run import Run

_log = logging.getLogger(__name__)


def check_output_dir(folder: Path) -> None:
    """Raises UserError for a file, a folder that is no run's, or a place where nothing can be written."""
    filled = folder.is_dir() and any(folder.iterdir())
    if filled and not any((folder / name).exists() for name in (".lock", "run.json")):
        raise UserError(f"output_dir {folder}: is not empty and no run's folder; choose another one")
    place = folder.absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise UserError(f"output_dir {folder}: {place} is a file; choose another folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"output_dir {folder}: nothing can be written into {place}; choose another folder")


def lock_existing(run: Run, stack: ExitStack) -> bool:
    """Hold the folder of an earlier run; false where there is none yet.

    A new folder is made, by `lock_new`, when all else is known to be well.
    """
    folder = run.output_dir
    check_output_dir(folder)
    if not folder.is_dir() or not any(folder.iterdir()):
        return False
    stack.enter_context(OutputLock(folder))
    return True


def lock_new(run: Run, stack: ExitStack) -> None:
    """Make the folder and hold it.  Raises UserError where another run has begun in it in the meantime."""
    folder = run.output_dir
    try:
        stack.enter_context(OutputLock(folder))
    except OSError as error:
        raise UserError(f"output_dir {folder}: {error.strerror}: {error.filename}") from error
    if (folder / "run.json").exists():
        raise UserError(
            f"output_dir {folder}: another run has begun here since this one was started; choose another "
            "one, or start again to go on with that run"
        )


def checkpoint_to_resume(run: Run, checkpoints: CheckpointManager) -> Checkpoint | None:
    """The checkpoint that `checkpoint.resume` asks for; the run then stands at its step.

    The first process looks and verifies for all.
    """
    found = from_first(lambda: _find(run, checkpoints), run.control)
    if found is None:
        return None
    run.step = found.state()["step"]
    return found


def _find(run: Run, checkpoints: CheckpointManager) -> Checkpoint | None:
    config, mode = run.config, run.config.checkpoint.resume
    if mode == "never":
        if run.output_dir.is_dir() and any(run.output_dir.iterdir()):
            message = (
                f"never, but output_dir {run.output_dir} is not empty; choose another one, or resume: auto"
            )
            raise config.problems(ConfigProblems([(("checkpoint", "resume"), message)]))
        return None
    found = checkpoints.latest() if mode == "auto" else _named(run, Path(mode), checkpoints)
    if found is not None:
        differences = resume_differences(found.state()["config"], config)
        if differences:
            raise config.problems(ConfigProblems(differences))
    return found


def _named(run: Run, path: Path, checkpoints: CheckpointManager) -> Checkpoint:
    """The checkpoint at `path`, or, where that is another run's and this one has gone on from it, our own."""
    if not path.resolve().is_relative_to(run.output_dir.resolve()):
        own = checkpoints.latest()
        if own is not None:
            _log.warning("checkpoint.resume: %s: going on from %s, which came after it", path, own.path)
            return own
    try:
        return checkpoints.open(path)
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint.resume: {error}") from None


#: What an `auto` is resolved by, beside the machine.
_PLACE = ("dp_size", "tp_size", "pp_size", "layout", "ops", "use_flash")


def settled(run: Run, checkpoint: Checkpoint | None) -> dict[str, Any]:
    """The autos of `train` as the checkpoint's run resolved them, where nothing asks for another answer."""
    if checkpoint is None:
        return {}
    state, now = checkpoint.state(), run.config.to_mapping()
    before = state["config"]
    if any(before.get(key) != now[key] for key in _PLACE):
        return {}
    same_rows = before["train"]["micro_batch_size"] == now["train"]["micro_batch_size"]
    keys = ["compile", *(["activation_checkpointing"] if same_rows else [])]
    return {
        key: state["resolved"][key]
        for key in keys
        if before["train"].get(key) == now["train"][key] == "auto" and key in state["resolved"]
    }


def same_data(config: CollieConfig, checkpoint: Checkpoint, data: TokenizedDataset) -> None:
    """Refuse to go on with other records: the position in the data would mean nothing."""
    if checkpoint.state()["data"] != data.fingerprint:
        message = "its records or their tokens have changed since the checkpoint; use another output_dir"
        raise config.problems(ConfigProblems([(("data", "train"), message)]))


def is_finished(run: Run, checkpoint: Checkpoint | None) -> bool:
    """True where the last step was done before, and its result exported after that."""
    from collie_core.models.sources import exported

    if checkpoint is None or run.step < run.total_steps:
        return False
    result = exported(run.output_dir)
    return result is not None and result.stat().st_mtime >= checkpoint.path.stat().st_mtime
