"""`collie slurm CONFIG --nodes N [--gpus-per-node G] [--dry-run] [key.path=value ...]`"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from collie_core.errors import UserError

if TYPE_CHECKING:
    from collie_core.config.schema import CollieConfig

#: options of sbatch that have an option here
PASSED = ("partition", "account", "qos", "constraint", "cpus-per-task", "mem")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="changes to the config")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="number of machines (default 1)")
    tasks = parser.add_mutually_exclusive_group()
    tasks.add_argument(
        "--gpus-per-node", type=int, metavar="G", help="GPUs of each, one a process; default: what sizes need"
    )
    tasks.add_argument("--tasks-per-node", type=int, metavar="T", help="processes of each, without GPUs")
    parser.add_argument("--time", help="time limit, as sbatch reads it")
    for option in PASSED:
        parser.add_argument(f"--{option}", metavar=option.upper(), help="as for sbatch")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION=VALUE", help="any other option of sbatch"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the script and do nothing")


def run(args: argparse.Namespace) -> int:
    """Check, write `OUTPUT_DIR/slurm/job.sh` and submit it; prints the job's number."""
    from collie_core.config.load import load_config
    from collie_core.files import OutputLock
    from collie_core.launch.preflight import check_before_launch
    from collie_core.launch.sbatch import BatchJob, check_time

    config = load_config(args.config, args.overrides)
    tasks = _tasks_per_node(args, config)
    if config.checkpoint.resume == "never":
        raise UserError(
            "checkpoint.resume: never, but a job that is put back into the queue must resume; use auto"
        )
    if args.time:
        check_time(args.time, config.train.stop_grace)
    check_before_launch(config)
    output_dir = Path(config.output_dir)
    passed = [(name, getattr(args, name.replace("-", "_"))) for name in PASSED]
    job = BatchJob(
        name=output_dir.name,
        folder=output_dir / "slurm",
        nodes=args.nodes,
        tasks_per_node=tasks,
        notice=config.train.stop_grace,
        gpus=args.tasks_per_node is None,
        time=args.time,
        options=[*(f"{name}={value}" for name, value in passed if value), *args.sbatch],
    )
    script = job.script(["train", args.config, *args.overrides])
    if args.dry_run:
        print(script, end="")
        return 0
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise UserError("sbatch is not on the PATH; run this where jobs are submitted, or with --dry-run")
    with OutputLock(output_dir):  # no run is using it; and it becomes a run's folder
        job.folder.mkdir(exist_ok=True)
        (job.folder / "job.sh").write_text(script)
    return _submit(sbatch, job.folder / "job.sh")


def _tasks_per_node(args: argparse.Namespace, config: CollieConfig) -> int:
    """Processes a node.  Raises UserError where nodes and sizes do not make the same number."""
    from collie_core.config.checks import arithmetic, product

    for name in ("nodes", "gpus_per_node", "tasks_per_node"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}: expected a whole number >= 1, got {value}")
    processes, nodes = product(config), args.nodes
    for name in ("gpus_per_node", "tasks_per_node"):
        value = getattr(args, name)
        if value is not None and nodes * value != processes:
            option = f"--{name.replace('_', '-')}"
            raise UserError(
                f"--nodes {nodes} x {option} {value} = {nodes * value}, but {arithmetic(config)}; "
                "change a size (such as dp_size=N) or the nodes"
            )
    if processes % nodes:
        raise UserError(f"{arithmetic(config)} processes cannot be spread evenly over --nodes {nodes}")
    return processes // nodes


def _submit(sbatch: str, script: Path) -> int:
    done = subprocess.run([sbatch, "--parsable", str(script)], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"sbatch refused {script}: {done.stderr.strip()}")
    number = done.stdout.strip().split(";")[0]
    print(number)
    print(f"submitted job {number}: {script}, output in {script.parent}/{number}.out", file=sys.stderr)
    return 0
