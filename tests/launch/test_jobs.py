"""Jobs of real processes: how they end by themselves, by a signal, by an error, and by a death."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
WORKER = str(HERE / "worker.py")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
FROZEN = "os.kill(os.getpid(), signal.SIGSTOP)"


class Job:
    """A job of two workers, under our launcher unless another command is given."""

    def __init__(self, *arguments: str, grace: str = "60", launcher: tuple[str, ...] = (), save: str = "0"):
        own = (sys.executable, str(HERE / "launch_script.py"), "2", grace)
        self.process = subprocess.Popen(
            [*(launcher or own), WORKER, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "SAVE_SECONDS": save},
        )
        self.out = ""

    def until(self, text: str) -> None:
        """Read its output until a line holds the text."""
        assert self.process.stdout
        while text not in (line := self.process.stdout.readline()):
            assert line, f"ended without {text!r}: {self.end()}"
            self.out += line

    def end(self, timeout: float = 90) -> tuple[int, str]:
        """Wait; its exit status and stderr, of which torchrun's own lines are left out."""
        out, err = self.process.communicate(timeout=timeout)
        self.out += out
        assert not survivors(self.process.pid), "processes are left behind"
        return self.process.returncode, err


def survivors(launcher: int) -> list[str]:
    """Workers whose launcher has ended, a second later."""
    deadline = time.monotonic() + 1
    while found := [line for line in workers() if str(launcher) == line.split()[1]]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return found


def workers() -> list[str]:
    """`pid parent` of every worker process."""
    command = ["ps", "-wweo", "pid,ppid,args"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    return [line for line in shown.stdout.splitlines() if f" {WORKER} " in line]


@pytest.fixture(scope="module", autouse=True)
def long_jobs() -> Iterator[dict[str, Job]]:
    """Those that take long, begun first so that they run beside the others."""
    jobs = {
        "save": Job("100000", save="45"),
        "frozen": Job("1000", FROZEN),
        "frozen under torchrun": Job("1000", FROZEN, launcher=TORCHRUN),
        "asleep": Job("10", "time.sleep(30)"),
    }
    jobs["save"].until("step 0")
    jobs["save"].process.send_signal(signal.SIGTERM)
    jobs["frozen"].until("step 2")
    jobs["frozen under torchrun"].until("step 2")
    yield jobs
    for job in jobs.values():
        for line in survivors(job.process.pid):  # where only some of the tests were run
            os.kill(int(line.split()[0]), signal.SIGKILL)
        job.process.kill()


def test_all_end_well_and_rank_0_alone_prints() -> None:
    job = Job("5")
    assert job.end() == (0, "")
    assert job.out.splitlines() == [f"step {step}" for step in range(5)]


@pytest.mark.parametrize(
    ("code", "status", "told"),
    [
        ("raise DataError('record 7 is empty')", 2, "error: rank 1: record 7 is empty"),
        ("raise OutOfMemory('out of memory')", 3, "error: rank 1: out of memory"),
        ("raise ValueError('boo')", 1, "error: rank 1: ValueError: boo"),
        ("os._exit(7)", 1, "ended with exit status 7"),
        ("os.kill(os.getpid(), 9)", 1, "was killed by SIGKILL"),
    ],
)
def test_the_first_error_is_told_once_with_its_rank(code: str, status: int, told: str) -> None:
    started = time.monotonic()
    found, err = Job("1000", code).end()
    assert found == status
    assert err.startswith("error: rank 1: ") and told in err and err.count("error: ") == 1, err
    assert "Traceback" not in err and "peer" not in err
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_all_ranks(number: signal.Signals) -> None:
    job = Job("100000")
    job.until("step 3")
    job.process.send_signal(number)
    assert job.end() == (128 + number, "")
    assert job.out.count("saved after") == 1


def test_a_second_interrupt_ends_at_once() -> None:
    job = Job("100000", save="60")
    job.until("step 3")
    job.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    job.process.send_signal(signal.SIGINT)
    job.end(timeout=10)
    assert "saved" not in job.out


def test_a_stop_takes_no_longer_than_its_grace() -> None:
    job = Job("100000", grace="2", save="60")
    job.until("step 3")
    job.process.send_signal(signal.SIGTERM)
    status, err = job.end(timeout=20)
    assert status == 1
    assert err.splitlines() == [
        "error: not stopped within 2 s of SIGTERM (train.stop_grace); "
        "killed, it goes on from its last checkpoint"
    ]


def test_a_stop_does_not_wait_for_a_dead_peer() -> None:
    job = Job("100000", "time.sleep(2); os.kill(os.getpid(), 9)", save="60")
    job.until("step 2")
    job.process.send_signal(signal.SIGTERM)
    status, err = job.end(timeout=30)
    assert status == 1 and "killed by SIGKILL" in err


def test_the_processes_end_with_their_launcher() -> None:
    job = Job("100000")
    job.until("step 3")
    pids = [line.split()[0] for line in workers() if line.split()[1] == str(job.process.pid)]
    assert len(pids) == 2
    job.process.kill()
    deadline = time.monotonic() + 30
    while any(line.split()[0] in pids for line in workers()):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_suspended_job_goes_on() -> None:
    job = Job("150")
    job.until("step 3")
    job.process.send_signal(signal.SIGTSTP)
    time.sleep(3)
    states = subprocess.run(["ps", "-eo", "ppid,stat"], capture_output=True, text=True, check=True).stdout
    mine = [line.split()[1][0] for line in states.splitlines()[1:] if line.split()[0] == str(job.process.pid)]
    assert mine == ["T", "T"]
    job.process.send_signal(signal.SIGCONT)
    assert job.end() == (0, "")


def test_under_torchrun_the_error_is_told_once() -> None:
    status, err = Job("1000", "raise DataError('record 7 is empty')", launcher=TORCHRUN).end()
    assert status == 1  # torchrun's
    assert err.count("error: rank 1: record 7 is empty") == 1 and "error: rank 0" not in err


def test_under_torchrun_a_death_ends_all() -> None:
    started = time.monotonic()
    status, err = Job("1000", "os.kill(os.getpid(), 9)", launcher=TORCHRUN).end()
    assert status == 1 and "lost rank 1 (process " in err
    assert time.monotonic() - started < 30


def test_a_frozen_process_ends_all(long_jobs: dict[str, Job]) -> None:
    status, err = long_jobs["frozen"].end(timeout=60)
    assert status == 1
    assert err.startswith("error: rank 1: process ") and "no life" in err and err.count("error:") == 1


def test_a_frozen_process_ends_all_under_torchrun(long_jobs: dict[str, Job]) -> None:
    status, err = long_jobs["frozen under torchrun"].end(timeout=60)
    assert status == 1 and err.count("error: rank 1: process ") == 1 and "no life" in err


def test_a_slow_process_is_left_alone(long_jobs: dict[str, Job]) -> None:
    assert long_jobs["asleep"].end() == (0, "")


def test_a_save_longer_than_torchruns_patience_is_not_cut(long_jobs: dict[str, Job]) -> None:
    assert long_jobs["save"].end(timeout=120) == (143, "")
    assert long_jobs["save"].out.count("saved after") == 1
