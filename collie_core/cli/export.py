"""`collie export SRC OUT [--as NAME] [--merge]`"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from collie_core.models.causal_lm import CausalLM
    from collie_core.models.provider import SelectedProvider


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "source", metavar="SRC", help="model or adapter folder, hub id, run folder or checkpoint"
    )
    parser.add_argument("out", metavar="OUT", help="new or empty folder")
    parser.add_argument(
        "--as", dest="relative", metavar="NAME", help="write as a family that transformers implements"
    )
    parser.add_argument("--provider", metavar="NAME", help="model plugin; default: that of SRC")
    parser.add_argument("--revision", metavar="R", help="of a hub id")
    parser.add_argument("--merge", action="store_true", help="fold the adapters of SRC into the weights")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: as stored")


def run(args: argparse.Namespace) -> int:
    """Write OUT in Hugging Face layout (adapters that are not merged: in theirs); prints the folder."""
    import torch

    from collie_core.errors import UserError
    from collie_core.models.export import export_pretrained, require_empty
    from collie_core.models.provider import select_provider
    from collie_core.models.sources import stream_parameters

    out = Path(args.out)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    selected = select_provider(args.source, provider=args.provider, revision=args.revision)
    if args.merge and not selected.adapters:
        raise UserError(f"{args.source}: --merge: it has no adapters")
    require_empty(out)
    if selected.adapters and not args.merge:
        if args.relative:
            raise UserError(f"--as {args.relative}: adapters have no relatives; merge them with --merge")
        _adapted(selected, dtype).save_pretrained(out)
    else:
        export_pretrained(
            out,
            selected.provider,
            selected.config,
            selected.hf_config,
            _merged(selected, dtype) if args.merge else stream_parameters(selected, dtype),
            source=selected.path,
            relative=args.relative,
        )
    print(out)
    return 0


def _adapted(selected: SelectedProvider, dtype: torch.dtype | None) -> CausalLM:
    """The model with its adapters."""
    from collie_core.models.adapters import load_adapted
    from collie_core.models.auto import build_model

    model = build_model(selected)
    model.adapters = load_adapted(model, selected, device="cpu", dtype=dtype)
    return model


def _merged(selected: SelectedProvider, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """The parameters of the model with its adapters folded in.  Raises UserError where they cannot be."""
    from collie_core.models.loading import Slots

    model = _adapted(selected, dtype)
    model.merge_adapters()
    slots = Slots(model)
    return ((name, t.detach()) for name, t in slots.tensors.items() if name not in slots.copies)
