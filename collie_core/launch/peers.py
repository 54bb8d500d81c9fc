"""The other processes of the job: each one's heart beats, and the first failure ends all of them.

A collective cannot tell a peer that is slow from one that is gone.  Here a thread of each process counts up
a beat in the job's store every second, and watches that of its neighbour: a long compile, save or evaluation
beats on, a frozen or dead process does not.  Beats are counted against a process's own, not by the clock, so
a job that is suspended as a whole goes on when it is continued.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from collie_core.errors import RunFailed
from collie_core.launch.failure import Failure, describe, is_consequence
from collie_core.launch.world import World, machine, rendezvous

if TYPE_CHECKING:
    from torch.distributed import Store, TCPStore

BEAT_S = 1.0
#: A heart that misses so many beats has stopped; all are gone by UNWIND_S after it, 30 s in all.
SILENT_BEATS = 18
#: How long a process may take to end well once another has failed.
UNWIND_S = 6.0
#: How long the interpreter's end may then take.
EXIT_S = 10
#: How long an error that is only a consequence waits for its cause to be told.
CAUSE_S = 3.0
JOIN_S = 600.0
FAILURE = "failure"


def failure_store(store: Store, environ: Mapping[str, str] = os.environ) -> Store:
    """The part of the job's store where beats and the first failure are, of this start of the processes."""
    from torch.distributed import PrefixStore

    return PrefixStore(f"collie/{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def claim(store: Store, failure: Failure) -> Failure:
    """Make `failure` the job's, unless another came first; returns the job's."""
    return Failure.from_json(store.compare_set(FAILURE, "", failure.to_json()))


class Peers:
    """This process's place among those of the job, from `join` until `leave`."""

    def __init__(self, world: World) -> None:
        """Meet the others at the job's store, which rank 0 opens under slurm.

        Raises RunFailed where that does not come about.
        """
        self.world = world
        self.held = False
        self.store = self._connect()
        self._mine = failure_store(self.store)
        self._mine.set(f"who/{world.rank}", json.dumps(_identity()))
        self._mine.add(f"beat/{world.rank}", 1)  # from here on its silence means something
        # a connection serves one call at a time, and the heart must not wait for the main thread
        self._hearts = failure_store(self._client())
        self._left = threading.Event()
        self._rounds = 0
        self._failure: Failure | None = None
        self._told: bool | None = None
        self._threads = [
            threading.Thread(target=work, name=f"collie{work.__name__}", daemon=True)
            for work in (self._beat, self._watch)
        ]
        for thread in self._threads:
            thread.start()

    # ------------------------------------------------------------------ the main thread's calls

    def fail(self, error: BaseException) -> bool:
        """Tell all that this process ends by `error`; False where another's failure came first.

        Only the first call tells it; later ones return the same.
        """
        if self._told is None:
            self._told = self._tell(error)
        return self._told

    def _tell(self, error: BaseException) -> bool:
        message, status = describe(error)
        with suppress(Exception):  # the store may be gone, and with it whoever had it
            if is_consequence(error):
                message = self._cause(message)
            mine = Failure(self.world.rank, message, status)
            self._failure = claim(self._mine, mine)
            return self._failure == mine
        return self._failure is None

    @property
    def failure(self) -> Failure | None:
        """The job's failure, as far as this process knows."""
        return self._failure

    def leave(self, error: BaseException | None) -> None:
        """Go, when all have come here; with an error, without the others, and then without the interpreter's
        end where native code waits in it for a broken collective.

        Who failed first stays a little, since a launcher may kill the others when it ends.
        """
        if self._left.is_set():
            return
        if error is not None and self._failure is None:
            self.fail(error)
        if error is not None:
            atexit.register(_gone_soon)
        deadline = time.monotonic() + UNWIND_S
        with suppress(Exception):
            self._mine.add(f"left/{self.world.rank}", 1)
            while self._waiting_for():
                first = self._failure is not None and self._failure.rank == self.world.rank
                if self._failure and not (first or self._hosts) or error and time.monotonic() > deadline:
                    break
                time.sleep(0.02)
            if self._hosts:  # the others may still be reading
                self._mine.add("closing", 1)
                time.sleep(0.2)
        self._left.set()
        # one that is in a call of the store when the interpreter ends aborts the process
        for thread in self._threads:
            thread.join(CAUSE_S)
        _process.clear()

    @property
    def _hosts(self) -> bool:
        return self.world.launcher == "slurm" and self.world.rank == 0

    def _waiting_for(self) -> bool:
        if self._mine.check(["closing"]):
            return False
        return any(not self._mine.add(f"left/{rank}", 0) for rank in self._everyone())

    def _everyone(self) -> range:
        return range(self.world.size)

    def _cause(self, message: str) -> str:
        """Wait for the peer that went away to say why; else name those whose hearts have stopped."""
        before = [self._mine.add(f"beat/{rank}", 0) for rank in self._everyone()]
        deadline = time.monotonic() + CAUSE_S
        while time.monotonic() < deadline and not self._mine.check([FAILURE]):
            time.sleep(0.1)
        silent = [
            rank
            for rank in self._everyone()
            if self._mine.add(f"beat/{rank}", 0) == before[rank] and not self._mine.add(f"left/{rank}", 0)
        ]
        if not silent:
            return message
        return f"lost {', '.join(self._name(self._mine, rank) for rank in silent)}: {message}"

    # ------------------------------------------------------------------ the threads

    def _beat(self) -> None:
        """Beat, hear the neighbour's heart, and look for a failure."""
        neighbour, last, silent = self._next(self.world.rank), 0, 0
        while not self._left.wait(BEAT_S):
            try:
                self._hearts.add(f"beat/{self.world.rank}", 1)
                while self._hearts.add(f"left/{neighbour}", 0) and neighbour != self.world.rank:
                    neighbour, last, silent = self._next(neighbour), 0, 0
                heard = self._hearts.add(f"beat/{neighbour}", 0)
                silent = silent + 1 if heard == last and heard else 0
                last = heard
                if silent >= SILENT_BEATS:
                    self._declare_dead(neighbour)
                if self._hearts.check([FAILURE]):
                    self._end(Failure.from_json(self._hearts.get(FAILURE)), told=True)
            except Exception as error:
                if not self._left.is_set():
                    self._end(self._lost(f"{type(error).__name__}: {error}"))
                return
            self._rounds += 1

    def _watch(self) -> None:
        """End the process when the heart itself waits for ever, since who holds the store is frozen."""
        last, silent = 0, 0
        while not self._left.wait(BEAT_S):
            silent = silent + 1 if self._rounds == last else 0
            last = self._rounds
            if silent > SILENT_BEATS:
                self._end(self._lost(f"it has not answered for {SILENT_BEATS} s"))

    def _next(self, rank: int) -> int:
        return (rank + 1) % self.world.size

    def _lost(self, reason: str) -> Failure:
        keeper = "rank 0" if self.world.launcher == "slurm" else "the launcher"
        return Failure(self.world.rank, f"lost the connection to {keeper}: {reason}", 1)

    def _name(self, store: Store, rank: int) -> str:
        who = json.loads(store.get(f"who/{rank}"))
        return f"rank {rank} (process {who['pid']} on {who['host']})"

    def _declare_dead(self, rank: int) -> None:
        """Claim the death of a silent peer and kill what is left of it on this machine."""
        who, own = json.loads(self._hearts.get(f"who/{rank}")), _identity()
        message = (
            f"process {who['pid']} on {who['host']} has shown no life for {SILENT_BEATS} s: "
            "it is frozen or dead, or its machine is"
        )
        failure = claim(self._hearts, Failure(rank, message, 1))
        if failure.message == message:
            _say(f"error: {failure}")
        if who["machine"] == own["machine"]:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(who["pid"], signal.SIGKILL)

    def _end(self, failure: Failure, told: bool = False) -> None:
        """Leave the main thread some time to end well, then end the process, whatever it waits for."""
        self._failure = self._failure or failure
        if self._left.wait(UNWIND_S):
            return
        if not told:
            _say(f"error: {failure}")
        os._exit(failure.status)

    # ------------------------------------------------------------------ the store

    def _connect(self) -> TCPStore:
        from torch.distributed import TCPStore

        host, port = rendezvous(self.world)
        patience = timedelta(seconds=JOIN_S)
        try:
            if self._hosts:
                return TCPStore(host, port, is_master=True, timeout=patience, wait_for_workers=False)
            return self._client()
        except (RuntimeError, ValueError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RunFailed(
                f"rank {self.world.rank} cannot meet the others at {host}:{port} ({first}); the variables "
                "MASTER_ADDR and MASTER_PORT say another place"
            ) from error

    def _client(self) -> TCPStore:
        from torch.distributed import TCPStore

        host, port = rendezvous(self.world)
        return TCPStore(
            host, port, is_master=False, timeout=timedelta(seconds=JOIN_S), wait_for_workers=False
        )


def _gone_soon() -> None:
    """Let the system end this process, as no thread of Python's may run any more."""
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(EXIT_S)


def _say(line: str) -> None:
    print(line, file=sys.__stderr__, flush=True)


def _identity() -> dict[str, Any]:
    """This process's host and id, and the machine in which the id means something."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "machine": machine()}


#: This process's Peers, if it has joined: like the default process group, a fact of the process.
_process: list[Peers] = []


def join(world: World) -> Peers:
    """The job's Peers; the first call meets the others."""
    if not _process:
        _process.append(Peers(world))
    return _process[0]


def joined() -> Peers | None:
    """What `join` returned, until it is left."""
    return _process[0] if _process else None
