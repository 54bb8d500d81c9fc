"""Jobs on a real slurm: two nodes train to the losses of one process; a pre-empted job goes on by itself."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from slurm_cluster import Cluster, missing

from collie_core.launch.slurm import expand

WHY_NOT = missing()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"no slurm: {WHY_NOT}")
COLLIE = (sys.executable, "-m", "collie_core")
WORKER = Path(__file__).parents[1] / "launch" / "worker.py"


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    """The cluster; its folder's path is short, for it holds sockets."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, Cluster(Path(folder) / "cluster") as cluster:
        yield cluster


@pytest.fixture
def folder(tiny_llama: Path, data_file: Path, tmp_path: Path) -> Path:
    """A folder with `run.yaml`."""
    mapping = {
        "model": {"path": str(tiny_llama), "dtype": "float32"},
        "optimizer": {"name": "lomo", "lr": 0.05},
        "data": {"train": str(data_file), "max_length": 64},
        "train": {"global_batch_size": 4, "micro_batch_size": 2, "epochs": 100},
        "output_dir": "out",
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(mapping))
    return tmp_path


def losses(out: Path) -> dict[int, float]:
    """Loss of every step so far."""
    path = out / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def collie(folder: Path, environ: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*COLLIE, *arguments], cwd=folder, env=environ, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done


def until(ready: Callable[[], Any], why: Callable[[], str], timeout: float = 90) -> None:
    deadline = time.monotonic() + timeout
    while not ready():
        assert time.monotonic() < deadline, why()
        time.sleep(0.1)


def output(out: Path) -> str:
    """What the jobs of a run printed."""
    return "\n".join(path.read_text() for path in (out / "slurm").glob("*.out"))


@pytest.mark.parametrize("size", ["dp_size", "pp_size"])
def test_a_job_on_two_nodes_has_the_losses_of_one_process(slurm: Cluster, folder: Path, size: str) -> None:
    collie(folder, slurm.environ, "train", "run.yaml", "train.max_steps=10", "output_dir=alone")
    submitted = collie(
        folder,
        slurm.environ,
        *("slurm", "run.yaml", "--nodes", "2", "--tasks-per-node", "1", f"{size}=2", "train.max_steps=10"),
    )
    job = slurm.wait(submitted.stdout.strip(), "COMPLETED", "FAILED")
    assert job["JobState"] == "COMPLETED", output(folder / "out")
    alone, together = losses(folder / "alone"), losses(folder / "out")
    assert together == pytest.approx(alone, rel=2e-6) and len(together) == 10
    assert output(folder / "out").count("finished: 10 steps") == 1


def test_a_preempted_job_goes_on_to_the_same_losses(slurm: Cluster, folder: Path) -> None:
    collie(folder, slurm.environ, "train", "run.yaml", "output_dir=alone", "train.epochs=100")
    out = folder / "out"
    nodes = ("--nodes", "2", "--tasks-per-node", "1", "dp_size=2")
    submitted = collie(folder, slurm.environ, "slurm", "run.yaml", *nodes, "train.epochs=100")
    number = submitted.stdout.strip()
    until(lambda: len(losses(out)) >= 5, lambda: f"{slurm.job(number)} {output(out)}")
    ask = ("-p", "urgent", "-N2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 2")
    urgent = slurm.call("sbatch", "--parsable", *ask)
    slurm.wait(urgent, "COMPLETED")
    until(lambda: slurm.job(number)["JobState"] == "PENDING", lambda: str(slurm.job(number)))
    slurm.call("scontrol", "update", f"JobId={number}", "StartTime=now")  # slurm would wait two minutes
    job = slurm.wait(number, "COMPLETED", "FAILED", "CANCELLED")
    assert job["JobState"] == "COMPLETED", output(out)
    assert job["Restarts"] == "1"
    assert "stopped by SIGTERM after step" in output(out) and "resuming after step" in output(out)
    assert losses(out) == pytest.approx(losses(folder / "alone"), rel=2e-6)


def test_a_job_that_failed_is_not_put_back(slurm: Cluster, folder: Path) -> None:
    submitted = collie(
        folder, slurm.environ, "slurm", "run.yaml", "--tasks-per-node", "1", "train.trainable=[nothing]"
    )
    job = slurm.wait(submitted.stdout.strip(), "COMPLETED", "FAILED")
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0")
    assert "'nothing' matches no parameter" in output(folder / "out")


def test_a_cancelled_job_saves_and_is_not_put_back(slurm: Cluster, folder: Path) -> None:
    out = folder / "out"
    submitted = collie(
        folder, slurm.environ, "slurm", "run.yaml", "--tasks-per-node", "1", "train.epochs=1000"
    )
    number = submitted.stdout.strip()
    until(lambda: len(losses(out)) >= 5, lambda: f"{slurm.job(number)} {output(out)}")
    slurm.call("scancel", number)
    job = slurm.wait(number, "CANCELLED")
    until(lambda: "stopped by SIGTERM" in output(out), lambda: output(out))
    until(lambda: not slurm.call("squeue", "-h"), lambda: slurm.call("squeue"))
    assert slurm.job(number)["JobState"] == "CANCELLED" and job["Restarts"] == "0"
    assert list((out / "checkpoints").glob("step_*"))


def test_srun_shows_the_first_error_once_and_ends_all(slurm: Cluster) -> None:
    started = time.monotonic()
    done = subprocess.run(
        ["srun", "-N2", "-n2", sys.executable, str(WORKER), "1000", "raise DataError('record 7 is empty')"],
        env=slurm.environ,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr.count("record 7 is empty") == 1 and "error: rank 1: record 7 is empty" in done.stderr
    assert done.returncode == 2
    assert time.monotonic() - started < 30


def test_srun_ends_all_when_one_is_frozen(slurm: Cluster) -> None:
    done = subprocess.run(
        ["srun", "-N2", "-n2", sys.executable, str(WORKER), "1000", "os.kill(os.getpid(), 19)"],
        env=slurm.environ,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode != 0
    assert done.stderr.count("error: rank 1: process") == 1 and "no life" in done.stderr


def test_two_jobs_on_the_same_nodes_do_not_meet(slurm: Cluster) -> None:
    command = ["srun", "-N2", "-n2", "--oversubscribe", sys.executable, str(WORKER), "40"]
    both = [
        subprocess.Popen(command, env={**slurm.environ, "SLURM_OVERLAP": "1"}, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    assert [job.communicate(timeout=90)[0].count(b"step 39") for job in both] == [1, 1]
    assert [job.returncode for job in both] == [0, 0]


@pytest.mark.parametrize("nodes", ["node01", "gpu[1-3,07],login", "a[1-2]b[3-4]", "n[008-011]", "r-n[2,4],x"])
def test_node_lists_are_read_as_scontrol_reads_them(slurm: Cluster, nodes: str) -> None:
    assert list(expand(nodes)) == slurm.call("scontrol", "show", "hostnames", nodes).split()
