"""What must outlive a process to continue its W&B run: the run's id, and which steps W&B holds."""

from __future__ import annotations

import json
import secrets
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from collie_core.files import write_json_atomic

FILE = "collie_run.json"


@dataclass(frozen=True)
class State:
    """logged: the last step that W&B holds outside of `unfinished`, the folder that a process is writing."""

    id: str
    logged: int = -1
    unfinished: str | None = None


class Record:
    """The state of `folder` (`output_dir/wandb`), kept in `collie_run.json`."""

    def __init__(self, folder: Path, state: State) -> None:
        self._folder = folder
        self._state = state

    @classmethod
    def of_run(cls, folder: Path, resumed: bool) -> Record:
        """The record of the run that is resumed, or a new one."""
        path = folder / FILE
        if resumed and path.exists():
            return cls(folder, State(**json.loads(path.read_text(encoding="utf-8"))))
        return cls(folder, State(id=secrets.token_hex(4)))

    @property
    def id(self) -> str:
        """W&B's id of the run."""
        return self._state.id

    def steps_in_earlier_files(self, resumed_at: int) -> int:
        """The last step in offline files of earlier processes.

        W&B writes them in blocks of 32 KiB, so the file of a killed process ends anywhere: it is removed, and
        its steps are to be written again, unless `wandb sync` has uploaded it.
        """
        if self._state.unfinished is None:
            return self._state.logged
        unfinished = self._folder / self._state.unfinished
        if unfinished.name.startswith("offline-run-") and not any(unfinished.glob("*.synced")):
            shutil.rmtree(unfinished, ignore_errors=True)
            return self._state.logged
        return resumed_at

    def begin(self, logged: int, unfinished: str) -> None:
        """A process writes the folder `unfinished`; W&B holds the steps up to `logged` elsewhere."""
        self._write(replace(self._state, logged=logged, unfinished=unfinished))

    def end(self, logged: int) -> None:
        """The process has ended well, and W&B holds the steps up to `logged`."""
        self._write(replace(self._state, logged=logged, unfinished=None))

    def _write(self, state: State) -> None:
        self._state = state
        write_json_atomic(self._folder / FILE, asdict(state))
