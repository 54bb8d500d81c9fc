"""Which process of the job this is, as torchrun or srun say, and the process group of all of them."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

from collie_core.errors import UserError

if TYPE_CHECKING:
    import torch

Launcher = Literal["none", "torchrun", "slurm"]


@dataclass(frozen=True)
class World:
    """This process among those of the job.

    rank of size processes, local_rank of the local_size on this machine; launcher: who started them.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launcher: Launcher = "none"


def current_world(environ: Mapping[str, str] | None = None) -> World:
    """What torchrun or srun say in the environment; one process where neither does.

    A torchrun inside a slurm step is heard first.  Raises UserError for variables that contradict each other.
    """
    environ = os.environ if environ is None else environ
    if "RANK" in environ or "WORLD_SIZE" in environ:
        given = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        return _checked("torchrun", given, [_whole(environ, name) for name in given])
    # A batch script or an interactive shell has job variables, or a step of one task; only srun has more.
    if int(environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
        from collie_core.launch.slurm import tasks_on_node

        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        return _checked(
            "slurm",
            (*names, "SLURM_STEP_TASKS_PER_NODE"),
            [*(_whole(environ, name) for name in names), tasks_on_node(environ)],
        )
    return World()


def _whole(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name)
    if value is None or not value.isdecimal():
        found = "is missing" if value is None else f"is {value!r}"
        raise UserError(f"environment: {name} {found}; expected a whole number, as torchrun or srun set it")
    return int(value)


def _checked(launcher: Launcher, names: tuple[str, ...], values: list[int]) -> World:
    rank, size, local_rank, local_size = values
    for index, count in ((0, 1), (2, 3)):
        if values[index] >= values[count]:
            raise UserError(
                f"environment: {names[index]} {values[index]} is not below {names[count]} {values[count]}; "
                "are variables of another job set in this shell?"
            )
    if local_size > size or local_rank > rank:
        raise UserError(
            f"environment: {names[2]} {local_rank} of {names[3]} {local_size} contradicts "
            f"{names[0]} {rank} of {names[1]} {size}; are variables of another job set in this shell?"
        )
    return World(rank, size, local_rank, local_size, launcher)


def machine() -> str:
    """What processes of this machine and container have in common, and no others."""
    with suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip() + os.readlink("/proc/self/ns/pid")
    return socket.gethostname()


def rendezvous(world: World, environ: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Host and port where the processes meet.  Raises UserError where they are not given or make no sense."""
    if world.launcher == "slurm":
        from collie_core.launch.slurm import first_host, job_port

        return environ.get("MASTER_ADDR") or first_host(environ), (
            _whole(environ, "MASTER_PORT") if environ.get("MASTER_PORT") else job_port(environ)
        )
    if not environ.get("MASTER_ADDR"):
        raise UserError("environment: MASTER_ADDR is missing; start the processes with torchrun or srun")
    return environ["MASTER_ADDR"], _whole(environ, "MASTER_PORT")


def local_device(world: World) -> torch.device:
    """This process's device: its own CUDA device where there is CUDA, else the CPU.

    Raises UserError where there are fewer devices than processes.
    """
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    # with srun's --gpus-per-task each process sees its own device alone
    index = 0 if world.launcher == "slurm" and count == 1 else world.local_rank
    if index >= count:
        raise UserError(
            f"rank {world.rank}: {world.local_size} processes on this machine, but {count} CUDA "
            f"device{'s' if count > 1 else ''}; start one process a device"
        )
    return torch.device("cuda", torch.cuda.current_device() if world.size == 1 else index)


def open_process_group(world: World, device: torch.device, timeout_s: float) -> None:
    """The default process group: nccl for CUDA tensors, gloo for those on the CPU.  Nothing for one process.

    A collective that waits longer than timeout_s fails.  A process that dies, or is frozen, ends the others
    in 30 s, whatever the timeout.
    """
    if world.size == 1:
        return
    import torch.distributed as dist

    from collie_core.launch.peers import join

    cuda = device.type == "cuda"
    if cuda:
        import torch

        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=dist.PrefixStore("process_group", join(world).store),
        rank=world.rank,
        world_size=world.size,
        timeout=timedelta(seconds=timeout_s),
        device_id=device if cuda else None,
    )


def open_group_of_one(device: torch.device) -> None:
    """A default process group of this process alone, for what wants one; whoever opens it destroys it."""
    import torch.distributed as dist

    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def close_process_group() -> None:
    """End the process group; while an exception is handled, leave at once and tell the others."""
    import torch.distributed as dist

    from collie_core.launch.peers import joined

    peers, error = joined(), sys.exception()
    if peers is None:
        return
    if error is None and dist.is_initialized():
        dist.destroy_process_group()
    elif dist.is_initialized() and dist.get_backend() == "gloo":
        # frees the peers from a collective with us; on a thread, as it may itself wait for a peer
        threading.Thread(target=dist.destroy_process_group, daemon=True).start()
    if not peers.held:  # by a command, which leaves when it has printed its result
        peers.leave(error)
