"""`collie export SRC OUT [--as NAME]`"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("source", metavar="SRC", help="model folder, hub id, run folder or checkpoint")
    parser.add_argument("out", metavar="OUT", help="new or empty folder")
    parser.add_argument(
        "--as", dest="relative", metavar="NAME", help="write as a family that transformers implements"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: as stored")


def run(args: argparse.Namespace) -> int:
    """Write OUT in Hugging Face layout; prints the folder."""
    from collie_core.errors import UserError
    from collie_core.models.sources import open_source

    out = Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: expected a new or empty folder, and it is not empty")
    open_source(args.source, dtype=args.dtype).export(out, relative=args.relative)
    print(out)
    print(f"exported {args.source} to {out}", file=sys.stderr)
    return 0
