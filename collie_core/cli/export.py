"""`collie export SRC OUT [--as NAME]`"""

from __future__ import annotations

import argparse
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
    import torch

    from collie_core.models.export import export_pretrained
    from collie_core.models.provider import select_provider
    from collie_core.models.sources import stream_parameters

    out = Path(args.out)
    selected = select_provider(args.source)
    export_pretrained(
        out,
        selected.provider,
        selected.config,
        selected.hf_config,
        stream_parameters(selected, getattr(torch, args.dtype) if args.dtype else None),
        source=selected.path,
        relative=args.relative,
    )
    print(out)
    return 0
