"""`collie train`, `collie eval` and `collie slurm` with sizes above 1: mistakes, and the batch script."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from training_helpers import config

from collie_core.cli.main import main
from collie_core.launch.sbatch import check_time, mark_stopped

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def collie(
    tiny_llama: Path, data_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run a command on a config; returns exit status, stdout and stderr, those of its processes too."""
    path = tmp_path / "run.yaml"
    mapping = config(tiny_llama, data_file, tmp_path / "out", data={"eval": str(data_file)}).to_mapping()
    path.write_text(yaml.safe_dump(mapping))

    def run(command: str, *arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        status = main([command, str(path), *arguments])
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return run


MISTAKES = [
    (
        ["--nproc", "4", "dp_size=2"],
        "--nproc 4, but dp_size 2 x tp_size 1 x pp_size 1 = 2; leave --nproc out",
    ),
    (["--nproc", "2"], "--nproc 2, but dp_size 1 x tp_size 1 x pp_size 1 = 1"),
    (["dp_size=2", "train.epoks=3"], "did you mean 'epochs'"),
    (["dp_size=2", "optimizer.name=lomoo"], "lomoo"),
    (["dp_size=2", "data.train=missing.jsonl"], "data.train: missing.jsonl: no such file or folder"),
    (["dp_size=2", "data.eval=missing.jsonl"], "data.eval: missing.jsonl: no such file or folder"),
    (["dp_size=2", "data.train=null"], "data.train: is required"),
    (["dp_size=2", "model.path=/nowhere"], "/nowhere"),
]


@pytest.mark.parametrize(("arguments", "told"), MISTAKES, ids=lambda value: str(value)[:40])
def test_mistakes_are_told_once_before_processes_start(
    collie: Run, tmp_path: Path, arguments: list[str], told: str
) -> None:
    status, out, err = collie("train", *arguments)
    assert status == 2 and told in err and err.count("error:") == 1 and out == ""
    assert "Traceback" not in err and not (tmp_path / "out").exists()


def test_eval_starts_processes_too(collie: Run) -> None:
    status, _, err = collie("eval", "dp_size=2", "--nproc", "3")
    assert status == 2 and "--nproc 3, but dp_size 2" in err


def test_another_number_of_processes_than_the_config_says_is_one_error(collie: Run, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *("-m", "collie_core", "train", str(tmp_path / "run.yaml"), "dp_size=3"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    told = "dp_size 3 x tp_size 1 x pp_size 1 = 3, but the job has 2 processes"
    assert done.returncode == 1 and done.stderr.count(told) == 1


def test_the_batch_script(collie: Run, tmp_path: Path) -> None:
    status, script, err = collie(
        "slurm",
        *("--nodes", "2", "--gpus-per-node", "4", "--partition", "long", "--time", "8:00:00"),
        *("--sbatch", "exclusive", "--dry-run", "dp_size=8", "output_dir=runs/a b"),
    )
    assert (status, err) == (0, "")
    for option in (
        *("nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "partition=long", "time=8:00:00", "exclusive"),
        *(
            "requeue",
            "open-mode=append",
            "signal=TERM@600",
            "job-name='a b'",
            "output='runs/a b/slurm/%j.out'",
        ),
    ):
        assert f"#SBATCH --{option}\n" in script
    assert "train " in script and "dp_size=8 'output_dir=runs/a b'" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert not Path("runs/a b").exists()


def test_the_batch_script_derives_what_the_sizes_say(collie: Run) -> None:
    status, script, _ = collie("slurm", "--nodes", "2", "--dry-run", "tp_size=2", "dp_size=2")
    assert status == 0 and "#SBATCH --ntasks-per-node=2" in script and "#SBATCH --gpus-per-node=2" in script
    status, script, _ = collie("slurm", "--tasks-per-node", "2", "--dry-run", "tp_size=2")
    assert status == 0 and "#SBATCH --ntasks-per-node=2" in script and "gpus" not in script


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--nodes", "2", "--gpus-per-node", "4"], "--nodes 2 x --gpus-per-node 4 = 8, but dp_size 1 x"),
        (["--nodes", "3", "dp_size=4"], "= 4 processes cannot be spread evenly over --nodes 3"),
        (["--nodes", "0"], "--nodes: expected a whole number >= 1, got 0"),
        (["--time", "soon"], "--time soon"),
        (["--time", "5"], "--time 5 is 300 s, but the run is told to save 600 s (train.stop_grace)"),
        (["checkpoint.resume=never"], "must resume"),
        (["data.train=missing.jsonl"], "missing.jsonl"),
    ],
    ids=str,
)
def test_mistakes_are_told_before_a_job_is_submitted(
    collie: Run, tmp_path: Path, arguments: list[str], told: str
) -> None:
    status, out, err = collie("slurm", *arguments)
    assert status == 2 and told in err and out == "" and not (tmp_path / "out").exists()


def test_without_sbatch_the_way_out_is_told(
    collie: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    status, _, err = collie("slurm")
    assert status == 2 and "sbatch is not on the PATH" in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("time", ["12", "11:30", "0:12:00", "1-0", "1-2:30", "1-0:0:5", "0"])
def test_time_limits_that_leave_time(time: str) -> None:
    check_time(time, 600.0)


def test_only_a_job_of_ours_is_marked_as_stopped(tmp_path: Path) -> None:
    folder = tmp_path / "slurm"
    mark_stopped(folder, {"SLURM_JOB_ID": "7"})
    assert not folder.exists()
    folder.mkdir()
    mark_stopped(folder, {})
    mark_stopped(folder, {"SLURM_JOB_ID": "7"})
    assert os.listdir(folder) == ["7.stopped"]
