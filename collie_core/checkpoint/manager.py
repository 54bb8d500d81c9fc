"""Writes a run's checkpoints so that a kill at any moment loses at most the one being written."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collie_core.checkpoint.folder import (
    CHECKPOINTS,
    STATE_FILE,
    Checkpoint,
    find_latest,
    open_checkpoint,
    step_folders,
    step_name,
)
from collie_core.checkpoint.manifest import Verify, verify, write_manifest
from collie_core.errors import CheckpointError, RunFailed
from collie_core.files import free_space, fsync_dir, fsync_file, json_text, write_text_atomic
from collie_core.together import first, from_first, together

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_log = logging.getLogger(__name__)

#: Folders that are being written, replaced or deleted by a process: `.step_000010.writing-4711`.
_TRANSIENT = re.compile(r"\.(step_\d{6,})\.(writing|replaced|deleting)-(\d{1,9})")


class CheckpointManager:
    """The checkpoints `OUTPUT_DIR/checkpoints/step_NNNNNN` of one run.

    A checkpoint is written in a folder aside, flushed to the disk, given its manifest, and only then
    renamed; so a folder of that name with a manifest is whole unless it is damaged later.
    The run holds the OutputLock of `output_dir`.  Of several processes the first makes, publishes and deletes
    folders, and the others write their files into them; `save` and `wait` are then collective.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        keep: int = 2,
        verify: Verify = "full",
        group: ProcessGroup | None = None,
    ) -> None:
        """`keep`: how many whole checkpoints to retain; `verify`: how thoroughly they are read.
        `group`: all processes, in which nobody else talks while a save is under way."""
        self.group = group
        self.output_dir = Path(output_dir)
        self.folder = self.output_dir / CHECKPOINTS
        self.keep = keep
        self._mode = verify
        self._background: Future[Path] | None = None

    def latest(self) -> Checkpoint | None:
        """The newest whole checkpoint; a warning names each newer one that is not whole, and why."""
        self._clean()
        return find_latest(self.output_dir, self._mode)

    def open(self, path: str | os.PathLike[str]) -> Checkpoint:
        """The checkpoint at `path` (a run folder: its newest whole one); raises CheckpointError."""
        return open_checkpoint(path, self._mode)

    def save(
        self,
        step: int,
        write: Callable[[Path], None],
        state: Mapping[str, Any],
        *,
        background: bool = False,
    ) -> Path:
        """Write checkpoint `step`: `write(folder)` writes tensors, `state` becomes `state.json`.

        Then all but the `keep` newest whole checkpoints up to this step are deleted.  Returns the final path.
        With `background`, a thread does all this: `write` must hold a copy of what training goes on to
        change, and `wait` tells the end.  `write` is called on every process.

        Raises RunFailed where the disk fails (the folder aside is removed, earlier checkpoints stay), and
        what `write` raises; also that of a save in the background before this one.
        """
        self.wait()
        state_text = json_text(dict(state)) if first() else ""
        aside = from_first(lambda: self._begin(step), self.group)
        if not background:
            return self._save(step, aside, write, state_text)
        pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._background = pool.submit(self._save, step, aside, write, state_text)
        pool.shutdown(wait=False)
        return self.folder / step_name(step)

    def wait(self) -> Path | None:
        """Wait for the save in the background, if one is under way; returns its path, raises its error."""
        background, self._background = self._background, None
        return background.result() if background else None

    def finished(self) -> bool:
        """True where a save in the background has ended and `wait` was not called yet."""
        return self._background is not None and self._background.done()

    def set_aside_after(self, step: int) -> None:
        """Rename checkpoints newer than `step`, from which the run goes on, to `.step_NNNNNN.superseded-N`.

        Otherwise a later resume would take up what this run has abandoned.
        """
        for newer, path in step_folders(self.folder).items():
            if newer > step:
                _set_aside(path, "superseded")

    def _begin(self, step: int) -> Path:
        """The folder aside, empty."""
        self._clean()
        aside = self.folder / f".{step_name(step)}.writing-{os.getpid()}"
        try:
            aside.mkdir(parents=True)
        except OSError as error:
            raise RunFailed(self._failure(step, error)) from error
        return aside

    def _save(self, step: int, aside: Path, write: Callable[[Path], None], state_text: str) -> Path:
        def complete() -> Path:
            write_text_atomic(aside / STATE_FILE, state_text)
            _flush(aside)
            write_manifest(aside, step)
            return self._publish(aside, step)

        try:
            together(lambda: write(aside), self.group)
            final = from_first(complete, self.group)
        except BaseException as error:
            if first():  # for all, who are done with it too
                shutil.rmtree(aside, ignore_errors=True)
            if isinstance(error, OSError):
                raise RunFailed(self._failure(step, error)) from error
            raise
        from_first(lambda: self._prune(step), self.group)
        return final

    def _publish(self, aside: Path, step: int) -> Path:
        final = self.folder / step_name(step)
        replaced = None
        if final.exists():
            try:
                verify(final, self._mode)
                replaced = self.folder / f".{final.name}.replaced-{os.getpid()}"
                final.rename(replaced)  # `_clean` renames it back if we are killed here
            except CheckpointError:
                _set_aside(final, "damaged")
        aside.rename(final)
        fsync_dir(self.folder)
        if replaced:
            shutil.rmtree(replaced, ignore_errors=True)  # what is left is removed at the next save
        return final

    def _prune(self, newest: int) -> None:
        """Delete whole checkpoints older than the `keep` newest ones up to step `newest`, just written."""
        kept = 1
        for step, path in step_folders(self.folder).items():
            if step >= newest:
                continue
            try:
                verify(path, "size")  # a damaged one, or a folder that is not ours, is left alone
            except CheckpointError:
                continue
            if kept < self.keep:
                kept += 1
                continue
            doomed = self.folder / f".{path.name}.deleting-{os.getpid()}"
            path.rename(doomed)  # never a half-deleted folder under the name of a whole one
            shutil.rmtree(doomed, ignore_errors=True)  # NFS keeps what a reader has open; see `_clean`

    def _clean(self) -> None:
        """Remove, or for a replaced checkpoint undo, what runs before this one left half done.

        This one holds the lock, so that whoever made it is gone, whatever host its pid was of.
        """
        for name, what, path in self._leftovers():
            original = self.folder / name
            if what == "replaced" and not original.exists():
                path.rename(original)
            else:
                shutil.rmtree(path, ignore_errors=True)

    def _leftovers(self) -> Iterator[tuple[str, str, Path]]:
        if not self.folder.is_dir():
            return
        saving = self._background is not None and not self._background.done()
        for path in list(self.folder.iterdir()):
            match = _TRANSIENT.fullmatch(path.name)
            if match and not (saving and int(match[3]) == os.getpid()):
                yield match[1], match[2], path

    def _failure(self, step: int, error: OSError) -> str:
        earlier = next(iter(step_folders(self.folder).values()), None)
        return (
            f"the checkpoint of step {step} could not be written to {self.folder}: {error.strerror or error} "
            f"({free_space(self.folder) / 2**30:.1f} GiB free there); "
            + (f"{earlier} stays as it was" if earlier else "there is no earlier one")
        )


def _flush(folder: Path) -> None:
    """Everything below `folder` to the disk: contents first, then names."""
    folders = [folder]
    for path in folder.rglob("*"):
        if path.is_dir():
            folders.append(path)
        elif path.is_file():
            fsync_file(path)
    for path in folders:
        fsync_dir(path)


def _set_aside(path: Path, why: str) -> None:
    """Rename to `.step_000010.damaged-1`, or with the next number that is free."""
    number = 1
    while (aside := path.with_name(f".{path.name}.{why}-{number}")).exists():
        number += 1
    path.rename(aside)
    fsync_dir(path.parent)
    _log.warning("%s is %s: moved to %s", path, why, aside)
