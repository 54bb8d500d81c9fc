"""The `collie` command: finds the subcommand, runs it, and turns errors into messages and exit statuses."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence

from collie_core import __version__
from collie_core.errors import nearest
from collie_core.launch.failure import describe

#: command -> what it does; the module of the same name has `add_arguments(parser)` and `run(args) -> status`
COMMANDS = {
    "train": "train a model as a YAML file says",
    "eval": "evaluate a model on the evaluation data of a YAML file",
    "generate": "complete a prompt",
    "export": "write a model in Hugging Face layout",
    "plugins": "list the installed plugins",
    "models": "list the model families and their checkpoints",
    "methods": "list the optimizers and adapters, what they cost and what they can be combined with",
    "config": "check or show a YAML file, or print the JSON schema",
    "data": "show the records of a YAML file as the model sees them",
    "slurm": "write a job for slurm and submit it",
    "doctor": "check the installation",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # read when torch is imported: where others use the cores too, threads that spin while they wait cost ten
    # times as much as those that sleep (2 cores: 246 against 2,375 tokens/s; idle ones: 3,850 against 3,700)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _log_to_stderr()
    try:
        status = _run(arguments)
        _flush_output()
        return status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone
        _drop_output()
        return 141
    except Exception as error:
        return _report(error)


class _Stderr(logging.Handler):
    """Log records as lines on what is stderr at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr, flush=True)


def _log_to_stderr() -> None:
    logger = logging.getLogger("collie_core")
    if not logger.handlers:
        logger.addHandler(_Stderr())


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage(), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"collie {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"error: unknown command {name!r}{nearest(name, COMMANDS)} (known: {known})", file=sys.stderr)
        return 2
    command = importlib.import_module(f"collie_core.cli.{name}")
    parser = argparse.ArgumentParser(prog=f"collie {name}", description=COMMANDS[name])
    command.add_arguments(parser)
    return int(command.run(_parse(parser, rest)))


def _flush_output() -> None:
    """Write what is buffered while its failure can still be told."""
    try:
        sys.stdout.flush()
    except OSError:
        _drop_output()
        raise


def _drop_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parse(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    try:  # lets options stand between `CONFIG` and `key.path=value`
        return parser.parse_intermixed_args(arguments)
    except TypeError:  # the command has actions, which argparse does not mix
        parsed, rest = parser.parse_known_args(arguments)
        if not hasattr(parsed, "overrides") or any(word.startswith("-") for word in rest):
            return parser.parse_args(arguments)
        parsed.overrides += rest
        return parsed


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, text in COMMANDS.items()]
    return "usage: collie COMMAND ...\n\n" + "\n".join(lines) + "\n\n`collie COMMAND --help` tells more."


def _report(error: Exception) -> int:
    message, status = describe(error)
    if os.environ.get("COLLIE_TRACEBACK") == "1":
        traceback.print_exception(error)
    print(f"error: {message}", file=sys.stderr)
    return status
