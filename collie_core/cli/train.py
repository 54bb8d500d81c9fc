"""`collie train CONFIG [--nproc N] [key.path=value ...]`"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collie_core.config.schema import CollieConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="changes to the config")
    parser.add_argument(
        "--nproc", type=int, metavar="N", help="number of processes; dp_size * tp_size * pp_size says it too"
    )
    parser.add_argument(
        "--profile", type=int, metavar="N", help="write a trace of N steps into the output folder"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Train; 0 when done, 143 or 130 when a signal ended it, saved and resumable.

    Outside torchrun and srun, more than one process are started here.
    """
    from collie_core.errors import UserError
    from collie_core.launch.command import run_command

    if args.profile is not None and args.profile < 1:
        raise UserError(f"--profile: expected a number of steps >= 1, got {args.profile}")
    options = ["--profile", str(args.profile)] if args.profile else []
    if args.json:
        options.append("--json")
    return run_command("train", args, options, "train", lambda config: _train(args, config))


def _train(args: argparse.Namespace, config: CollieConfig) -> int:
    from collie_core.launch.sbatch import mark_stopped
    from collie_core.train.profile import StepProfiler
    from collie_core.train.trainer import Trainer

    result = Trainer(config, callbacks=[StepProfiler(args.profile)] if args.profile else []).train()
    if args.json:
        summary = {
            "step": result.step,
            "evaluation": result.evaluation,
            "output_dir": str(result.output_dir),
            "model": str(result.model) if result.model else None,
            "stopped_by": result.signal.name if result.signal else result.stopped_by,
        }
        print(json.dumps(summary))
    if result.signal is not None:
        print(
            f"stopped by {result.signal.name} after step {result.step}; the same command goes on",
            file=sys.stderr,
        )
        mark_stopped(result.output_dir / "slurm")
        return 128 + int(result.signal)
    return 0
