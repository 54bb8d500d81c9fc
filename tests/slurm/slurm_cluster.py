"""A real slurm of two nodes on this host, with daemons and files of its own in one folder.

Both nodes are slurmd processes with their own port.  A job of the partition `urgent` pre-empts one of
`normal`, which is put back into the queue and has a grace time to save in.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "squeue")
NODES = ("n1", "n2")
GRACE_S = 60

SLURM_CONF = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=10
MinJobAge=3600
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SlurmctldTimeout=30
SlurmdTimeout=60
{nodes}
PartitionName=normal Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime={grace}
PartitionName=urgent Nodes=n[1-2] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why no slurm can be started here, or None."""
    absent = [name for name in PROGRAMS if not shutil.which(name)]
    if absent:
        return f"{', '.join(absent)} not installed (apt-get install slurm-wlm munge)"
    return None if os.getuid() == 0 else "slurmd needs root to start jobs"


class Cluster:
    """Within `with`, slurm's commands work when they get `environ`; at the end every daemon is gone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # the sockets' paths must be short, and the programs not in the test's environment
        self.environ = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def call(self, *command: str) -> str:
        """What a command of slurm prints."""
        done = subprocess.run(command, env=self.environ, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What slurm knows of a job: `JobState`, `Restarts`, `ExitCode`, ..."""
        words = self.call("scontrol", "show", "job", "--oneliner", number).split()
        return dict(word.partition("=")[::2] for word in words)

    def wait(self, number: str, *states: str, timeout: float = 120) -> dict[str, str]:
        """Wait until a job is in one of the states."""
        deadline = time.monotonic() + timeout
        while (job := self.job(number))["JobState"] not in states:
            assert time.monotonic() < deadline, f"job {number}: {job}\n{self.logs()}"
            time.sleep(0.3)
        return job

    def logs(self) -> str:
        """The ends of all logs."""
        return "\n".join(
            f"== {path.name}\n{path.read_text(errors='replace')[-3000:]}"
            for path in self.folder.glob("*.log")
        )

    def _start(self) -> None:
        (self.folder / "state").mkdir(parents=True)
        ports = _free_ports(1 + len(NODES))
        nodes = "\n".join(
            f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=2 State=UNKNOWN"
            for name, port in zip(NODES, ports[1:], strict=True)
        )
        (self.folder / "slurm.conf").write_text(
            SLURM_CONF.format(
                folder=self.folder, controller=ports[0], user=getpass.getuser(), nodes=nodes, grace=GRACE_S
            )
        )
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        self._daemon(
            *("munged", "--foreground", "--force", f"--key-file={key}"),
            *(f"--socket={self.folder}/munge.socket", f"--pid-file={self.folder}/munge.pid"),
            *(f"--log-file={self.folder}/munged.log", f"--seed-file={self.folder}/munge.seed"),
        )
        self._until(lambda: (self.folder / "munge.socket").exists(), "munged")
        self._daemon("slurmctld", "-D", "-c")
        self._until(lambda: "is UP" in self._try("scontrol", "ping"), "slurmctld")
        for name in NODES:
            self._daemon("slurmd", "-D", "-N", name)
        self._until(lambda: self._try("sinfo", "-h", "-p", "normal", "-o", "%t %D") == "idle 2", "slurmd")

    def _daemon(self, *command: str) -> None:
        output = (self.folder / f"{command[0]}-{len(self._daemons)}.log").open("wb")
        self._daemons.append(
            subprocess.Popen(command, env=self.environ, stdout=output, stderr=subprocess.STDOUT)
        )

    def _try(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environ, capture_output=True, text=True, timeout=60)
        return done.stdout.strip()

    def _until(self, ready: object, what: str) -> None:
        deadline = time.monotonic() + 60
        while not ready():  # type: ignore[operator]
            dead = [daemon.args for daemon in self._daemons if daemon.poll() is not None]
            assert not dead and time.monotonic() < deadline, f"{what} did not start; {dead}\n{self.logs()}"
            time.sleep(0.2)

    def _stop(self) -> None:
        if len(self._daemons) > 1:
            for line in self._try("squeue", "-h", "-o", "%i").split():
                self._try("scancel", "--signal=KILL", "--full", line)
                self._try("scancel", line)
            deadline = time.monotonic() + 20
            while self._try("squeue", "-h", "-o", "%i") and time.monotonic() < deadline:
                time.sleep(0.3)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports
