"""A command as one process of a job: rank 0 alone prints, and the first failure is told once."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout

from collie_core.launch.failure import describe
from collie_core.launch.world import World

#: How long rank 0 waits for the others to be gone before it ends with a status that a launcher may take ill.
LINGER_S = 1.0


@contextmanager
def as_rank(world: World) -> Iterator[None]:
    """The work of this process within the job.  Nothing for a job of one process.

    An error ends the process here, with the status of the job's first failure; the process which failed
    first prints it.
    """
    if world.size == 1:
        yield
        return
    if world.rank:  # before torch is imported
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from collie_core.launch.peers import join

    try:
        peers = join(world)
    except Exception as error:  # nobody to agree with
        print(f"error: {describe(error)[0]}", file=sys.stderr, flush=True)
        os._exit(describe(error)[1])
    peers.held = True
    try:
        with _quiet(world):
            yield
    except BaseException as error:
        # a launcher that sees the others fall must not change how we end
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if peers.fail(error):
            if os.environ.get("COLLIE_TRACEBACK") == "1":
                traceback.print_exception(error)
            interrupted = isinstance(error, KeyboardInterrupt)
            print("interrupted" if interrupted else f"error: {peers.failure}", file=sys.stderr, flush=True)
        peers.leave(error)
        _flush()
        # not by way of the interpreter's end, where threads of a broken collective may wait for ever
        os._exit(peers.failure.status if peers.failure else describe(error)[1])
    peers.leave(None)


def final_status(world: World, status: int) -> int:
    """The exit status of this process for a job that ends well with `status`.

    srun and torchrun kill the others when a process ends with another status than 0: only rank 0 does, last.
    """
    if world.size > 1 and world.rank:
        return 0
    if world.size > 1 and status:
        _flush()
        time.sleep(LINGER_S)
    return status


@contextmanager
def _quiet(world: World) -> Iterator[None]:
    """Leave Python's output to rank 0; what native code writes, such as a crash, stays visible."""
    with ExitStack() as stack:
        if world.rank:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        yield


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
