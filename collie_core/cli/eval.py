"""`collie eval CONFIG [--model M] [key.path=value ...]`"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collie_core.config.schema import CollieConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="changes to the config")
    parser.add_argument("--model", metavar="M", help="model folder, hub id, run folder or checkpoint")
    parser.add_argument("--provider", metavar="NAME", help="model plugin for M; default: M's own")
    parser.add_argument("--revision", metavar="R", help="of a hub id M")
    parser.add_argument("--nproc", type=int, metavar="N", help="number of processes, as for train")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(args: argparse.Namespace) -> int:
    """Print every evaluator's figures on the evaluation data."""
    from collie_core.errors import UserError
    from collie_core.launch.command import run_command

    given = {"path": args.model, "provider": args.provider, "revision": args.revision}
    if args.model is not None:  # what the config says of provider and revision is of its own model
        args.overrides += [f"model.{key}={json.dumps(value)}" for key, value in given.items()]
    elif args.provider or args.revision:
        raise UserError("--provider and --revision are of the model that --model names")
    options = ["--json"] if args.json else []
    return run_command("eval", args, options, "eval", lambda config: _evaluate(args, config))


def _evaluate(args: argparse.Namespace, config: CollieConfig) -> int:
    from collie_core.train.trainer import Trainer

    figures = Trainer(config).evaluate()
    if args.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name} {value:.6g}")
    return 0
