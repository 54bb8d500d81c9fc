"""Starts the processes of a job on this machine, forwards signals to them, and ends all when one dies.

The processes find the environment that torchrun gives.  torchrun itself kills 30 s after a stop, so that a
long save would be cut, and its exit status is not that of the run: see docs/decisions/launching.md.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING

from collie_core.launch.failure import Failure

if TYPE_CHECKING:
    from torch.distributed import Store

POLL_S = 0.05
#: When a process has failed, the others may take so long to end by themselves.
DEATH_GRACE_S = 12.0


def launch(arguments: Sequence[str], processes: int, stop_grace: float) -> int:
    """Run `python ARGUMENTS` as so many processes; returns the job's exit status.

    A first SIGTERM or SIGINT is forwarded, and the processes have stop_grace seconds to save; a second SIGINT
    kills them.
    """
    from torch.distributed import TCPStore

    from collie_core.launch.peers import failure_store

    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # on a port that is free
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(server.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    threads = max(1, len(os.sched_getaffinity(0)) // processes) if hasattr(os, "sched_getaffinity") else 1
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    # `-P`: a file in the working directory is no module, unless it was one for us
    isolated = [] if sys.path[0] in ("", os.getcwd()) else ["-P"]
    command = [sys.executable, *isolated, *arguments]
    job = _Job(failure_store(server, environment), stop_grace)
    with job.signals():
        try:
            job.start(command, processes, environment)
            return job.wait()
        finally:
            job.kill()


class _Job:
    def __init__(self, store: Store, stop_grace: float) -> None:
        self._store = store
        self._stop_grace = stop_grace
        self._living: dict[int, subprocess.Popen[bytes]] = {}
        self._statuses: list[int] = []
        self._stop: signal.Signals | None = None
        self._deadline: float | None = None
        self._too_slow = False

    def start(self, command: Sequence[str], processes: int, environment: Mapping[str, str]) -> None:
        for rank in range(processes):
            mine = {
                **environment,
                **dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)),
                **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes)),
            }
            # in a session of its own: a terminal's Ctrl-C comes through us, once
            self._living[rank] = subprocess.Popen(command, env=mine, start_new_session=True)
            if self._stop:  # it came while we were starting
                self._send(self._stop)

    def wait(self) -> int:
        """Until all have ended; the exit status."""
        while self._living:
            for rank, process in list(self._living.items()):
                if (status := process.poll()) is not None:
                    del self._living[rank]
                    self._ended(rank, status, process.pid)
            if self._living and self._deadline and time.monotonic() > self._deadline:
                self._give_up()
            time.sleep(POLL_S)
        return self._status()

    def kill(self) -> None:
        """End what is left at once."""
        self._send(signal.SIGKILL)
        for process in self._living.values():
            process.wait()
        self._living.clear()

    def _ended(self, rank: int, status: int, pid: int) -> None:
        self._statuses.append(status)
        if status == 0 or self._too_slow or (self._stop and status == 128 + self._stop):
            return
        failure = self._failure()
        if failure is None:
            from collie_core.launch.peers import claim

            mine = self._died(rank, status, pid)
            failure = claim(self._store, mine)
            if failure == mine:
                unsaved = self._stop and mine.status == 128 + self._stop
                print(mine.message if unsaved else f"error: {mine}", file=sys.stderr, flush=True)
        limit = time.monotonic() + DEATH_GRACE_S
        self._deadline = min(limit, self._deadline or limit)

    def _died(self, rank: int, status: int, pid: int) -> Failure:
        """What a process that could not say so itself ended of."""
        if self._stop and status == -self._stop:
            return Failure(rank, f"stopped by {self._stop.name} before training began", 128 + self._stop)
        if status > 0:
            return Failure(rank, f"process {pid} ended with exit status {status}", 1)
        name = signal.Signals(-status).name
        hint = " (as the kernel does when memory runs out: see dmesg)" if name == "SIGKILL" else ""
        return Failure(rank, f"process {pid} was killed by {name}{hint}", 1)

    def _give_up(self) -> None:
        if self._stop and self._failure() is None:
            self._too_slow = True
            print(
                f"error: not stopped within {self._stop_grace:g} s of {self._stop.name} (train.stop_grace); "
                "killed, it goes on from its last checkpoint",
                file=sys.stderr,
                flush=True,
            )
        self._send(signal.SIGKILL)
        self._deadline = None

    def _status(self) -> int:
        failure = self._failure()
        if failure:
            return failure.status
        if self._too_slow:
            return 1
        return 128 + self._stop if self._stop and any(self._statuses) else max(self._statuses)

    def _failure(self) -> Failure | None:
        from collie_core.launch.peers import FAILURE

        return Failure.from_json(self._store.get(FAILURE)) if self._store.check([FAILURE]) else None

    # ------------------------------------------------------------------ signals

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Within, signals to the launcher go to the processes."""
        handlers = {
            signal.SIGTERM: self._on_stop,
            signal.SIGINT: self._on_stop,
            signal.SIGTSTP: self._on_suspend,
        }
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        if self._stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._stop is None:
            self._stop = signal.Signals(number)
            self._deadline = self._deadline or time.monotonic() + self._stop_grace
            self._send(self._stop)

    def _on_suspend(self, number: int, frame: FrameType | None) -> None:
        self._send(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        self._send(signal.SIGCONT)  # when we are continued, so are they

    def _send(self, number: signal.Signals) -> None:
        for process in list(self._living.values()):
            with suppress(ProcessLookupError):
                process.send_signal(number)
