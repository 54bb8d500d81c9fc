"""`collie eval CONFIG [--model M] [key.path=value ...]`"""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="changes to the config")
    parser.add_argument("--model", metavar="M", help="model folder, hub id, run folder or checkpoint")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(args: argparse.Namespace) -> int:
    """Print every evaluator's figures on the evaluation data."""
    from collie_core.config.load import load_config
    from collie_core.train.trainer import Trainer

    config = load_config(args.config, args.overrides)
    if args.model is not None:
        config.model.path, config.model.provider, config.model.revision = args.model, None, None
    figures = Trainer(config).evaluate()
    if args.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name} {value:.6g}")
    return 0
