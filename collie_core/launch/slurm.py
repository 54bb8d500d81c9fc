"""What slurm's variables say of a step: its hosts, the tasks on this one, a port of its own."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping

from collie_core.errors import UserError

#: Below the ports that Linux gives to outgoing connections (32768 and up), above the well-known ones.
FIRST_PORT, PORTS = 20_000, 12_000
STEPS_A_JOB = 8


def tasks_on_node(environ: Mapping[str, str]) -> int:
    """Tasks of the step on this node, of `SLURM_STEP_TASKS_PER_NODE` such as `4(x2),3`."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or ""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not match:
            raise UserError(f"environment: SLURM_STEP_TASKS_PER_NODE is {text!r}; expected such as 4(x2)")
        counts += [int(match[1])] * int(match[2] or 1)
    node = environ.get("SLURM_NODEID", "0")
    if not node.isdecimal() or int(node) >= len(counts):
        raise UserError(
            f"environment: SLURM_NODEID is {node!r}, but SLURM_STEP_TASKS_PER_NODE {text!r} has "
            f"{len(counts)} nodes"
        )
    return counts[int(node)]


def job_port(environ: Mapping[str, str]) -> int:
    """A port that depends on job and step alone: all tasks know it, and jobs beside each other differ."""
    job, step = environ.get("SLURM_JOB_ID", ""), environ.get("SLURM_STEP_ID", "0")
    if not job.isdecimal() or not step.isdecimal():
        raise UserError(f"environment: SLURM_JOB_ID is {job!r} and SLURM_STEP_ID {step!r}; expected numbers")
    return FIRST_PORT + (int(job) * STEPS_A_JOB + int(step) % STEPS_A_JOB) % PORTS


def first_host(environ: Mapping[str, str]) -> str:
    """The address of the step's first node, where rank 0 runs (the launch node may be the login node).

    Raises UserError where the list cannot be read.
    """
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or ""
    shown = _scontrol("show", "hostnames", nodes)
    host = shown.split()[0] if shown.split() else next(expand(nodes))
    try:
        socket.getaddrinfo(host, None)
    except OSError:  # a node's name may not be a host's: slurm knows its address
        match = re.search(r"\bNodeAddr=(\S+)", _scontrol("show", "node", host))
        return match[1] if match else host
    return host


def _scontrol(*arguments: str) -> str:
    """What scontrol prints, or nothing where it is missing or fails."""
    program = shutil.which("scontrol")
    if program is None:
        return ""
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def expand(nodes: str) -> Iterator[str]:
    """Host names of a node list: `gpu[1-2,07],login` is gpu1, gpu2, gpu07, login.

    Numbers keep their zeros; a name may hold several brackets, of which the last counts fastest.
    Raises UserError for a list that is no such thing.
    """
    if not re.fullmatch(r"(?:[^\[\],\s]|\[[\d,-]+\])+(?:,(?:[^\[\],\s]|\[[\d,-]+\])+)*", nodes):
        raise UserError(f"environment: the node list is {nodes!r}; expected such as n[1-4,07]")
    for name in re.split(r",(?![^\[]*\])", nodes):
        yield from _expand_name(name)


def _expand_name(name: str) -> Iterator[str]:
    match = re.fullmatch(r"([^\[]*)\[([^\]]*)\](.*)", name)
    if not match:
        yield name
        return
    before, ranges, after = match.groups()
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            raise UserError(f"environment: the node list holds {name!r}; expected such as n[1-4,07]")
        for number in range(int(first), int(last or first) + 1):
            for rest in _expand_name(after):
                yield f"{before}{number:0{len(first)}}{rest}"
