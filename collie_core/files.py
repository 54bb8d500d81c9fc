"""Files that are whole or absent, and the lock that keeps two runs out of one output folder."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from collie_core.errors import CheckpointError, UserError


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Make `text` (UTF-8) the contents of the file `path`, which holds the old or the new after any crash."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(aside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


def write_json_atomic(path: str | os.PathLike[str], value: Any) -> None:
    """`write_text_atomic` of `json_text(value)`."""
    write_text_atomic(path, json_text(value))


def json_text(value: Any) -> str:
    """Strict JSON; raises TypeError or ValueError for what JSON cannot say, such as nan."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def read_json_object(path: Path) -> dict[str, Any]:
    """The mapping in a file.  Raises CheckpointError where it cannot be read, or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def fsync_file(path: str | os.PathLike[str]) -> None:
    """Wait until the contents of a file are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_dir(path: str | os.PathLike[str]) -> None:
    """Wait until the names in a folder (files made, renamed, removed) are on the disk."""
    fsync_file(path)


def free_space(path: str | os.PathLike[str]) -> int:
    """Bytes that can still be written where `path` is, or will be."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


class OutputLock:
    """Holds a run's output folder (made if missing), by flock: it goes with the process, however that ends.

    A context manager.  Raises UserError while another run holds the folder.
    """

    def __init__(self, output_dir: str | os.PathLike[str]) -> None:
        self.output_dir = Path(output_dir)
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock, or raise UserError with the process and host that hold it."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.output_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 300).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise UserError(
                f"{self.output_dir} is in use by a run that has not ended ({owner}); "
                "wait for it, stop it, or give another output_dir"
            ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on host {socket.gethostname()}\n".encode())
        self._descriptor = descriptor

    def release(self) -> None:
        """Give the folder free; the file `.lock` stays, since removing it would race with another run."""
        if self._descriptor is not None:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # a forked child may still hold the descriptor
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
