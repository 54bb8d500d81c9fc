"""The batch script of `collie slurm`."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from collie_core.errors import UserError

#: The largest number of seconds that `--signal` takes, and how much earlier than asked slurm may send it.
LONGEST_NOTICE, NOTICE_SLACK = 65_535, 60


@dataclass(frozen=True)
class BatchJob:
    """What is asked of slurm: so many nodes and processes on each, one a GPU unless `gpus` is false.

    notice: seconds before the time limit at which the processes are told to save.
    options: further options of sbatch, such as `partition=long`.
    """

    name: str
    folder: Path
    nodes: int
    tasks_per_node: int
    notice: float
    gpus: bool = True
    time: str | None = None
    options: Sequence[str] = field(default_factory=list)

    def script(self, arguments: Sequence[str]) -> str:
        """The text of the script that runs `collie ARGUMENTS` on every task."""
        notice = min(int(self.notice), LONGEST_NOTICE)
        options = [
            f"job-name={self.name}",
            f"nodes={self.nodes}",
            f"ntasks-per-node={self.tasks_per_node}",
            *([f"gpus-per-node={self.tasks_per_node}"] if self.gpus else []),
            *([f"time={self.time}"] if self.time else []),
            f"output={self.folder}/%j.out",
            "open-mode=append",
            "requeue",
            f"signal=TERM@{notice}",
            *self.options,
        ]
        lines = "\n".join(f"#SBATCH --{_quoted(option)}" for option in options)
        command = shlex.join([*collie(), *arguments])
        return SCRIPT.format(options=lines, folder=shlex.quote(str(self.folder)), command=command)


SCRIPT = """\
#!/bin/bash
{options}

# Before the time limit, and when the job is pre-empted, slurm sends SIGTERM to the tasks: they finish the
# step, save, and write the file that says so.  The script itself only waits for them, and puts the job back
# into the queue, where it goes on from its checkpoint.  A job that failed is not put back, nor one that was
# cancelled, which slurm no longer calls running.
trap : TERM
stopped={folder}/$SLURM_JOB_ID.stopped
rm -f "$stopped"
# since slurm 22.05 srun does not take it from the job
[ -n "$SLURM_CPUS_PER_TASK" ] && export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
srun --kill-on-bad-exit=1 --distribution=block {command}
status=$?
job=$(scontrol show job --oneliner "$SLURM_JOB_ID")
if grep -q 'JobState=RUNNING' <<< "$job"; then
    if [ -e "$stopped" ] || grep -q 'PreemptTime=[0-9]' <<< "$job"; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit "$status"
"""


def _quoted(option: str) -> str:
    name, equals, value = option.partition("=")
    return f"{name}{equals}{shlex.quote(value)}" if equals else name


def mark_stopped(folder: Path, environ: Mapping[str, str] = os.environ) -> None:
    """Tell the script, if it is one of ours that runs this, that the run was stopped and saved.

    The exit status cannot: slurm also stops the processes of a job in which one has failed.
    """
    job = environ.get("SLURM_JOB_ID")
    if job and folder.is_dir():
        (folder / f"{job}.stopped").touch()


def collie() -> list[str]:
    """The command that runs this collie in this environment on another machine."""
    script = Path(sys.executable).with_name("collie")
    return [str(script)] if script.is_file() else [sys.executable, "-P", "-m", "collie_core"]


def check_time(time: str, notice: float) -> None:
    """Raises UserError for a time limit that slurm does not read, or that leaves no time to train."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if not match:
        raise UserError(f"--time {time}: expected minutes, hours:minutes:seconds or days-hours")
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    units = (3600, 60, 1) if days is not None or len(numbers) == 3 else (60, 1, 0)
    seconds = int(days or 0) * 86_400 + sum(a * b for a, b in zip(numbers, units, strict=False))
    if seconds and seconds <= notice + NOTICE_SLACK:
        raise UserError(
            f"--time {time} is {seconds} s, but the run is told to save {notice:g} s (train.stop_grace) "
            f"before its end, and up to {NOTICE_SLACK} s earlier: give more time, or lower train.stop_grace"
        )
