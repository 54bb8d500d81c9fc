"""What each `train.activation_checkpointing` costs: forward and backward of a few compiled blocks, in turns.

    python benchmarks/recompute.py                                        # CUDA, blocks of LLaMA-7B, bf16
    python benchmarks/recompute.py --device cpu --shapes 1x64 --width 64 --heads 4 --no-compile
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from collie_core import CollieConfig
from collie_core.layouts.recompute import runner_for
from collie_core.ops import Context, select_ops
from collie_core.run import Run
from collie_models.decoder.config import DecoderConfig
from collie_models.decoder.model import Decoder
from collie_models.decoder.rotary import Rotary

MODES = ("none", "selective", "full", "offload")


def make(args: argparse.Namespace) -> tuple[nn.Module, Any]:
    """A decoder of `args.blocks` blocks on the device, and the operations it was built with."""
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    ops = select_ops(device=args.device, dtype=dtype)
    config = DecoderConfig(
        vocab_size=128,
        hidden_size=args.width,
        intermediate_size=args.width * 43 // 16,
        num_layers=args.blocks,
        num_heads=args.heads,
        num_kv_heads=args.heads,
        head_dim=args.width // args.heads,
        rotary=Rotary(args.width // args.heads),
    )
    return Decoder(config, ops).to(device=args.device, dtype=dtype), ops


def step_of(args: argparse.Namespace, model: Any, ops: Any, mode: str) -> Callable[[Tensor], None]:
    """Forward and backward under a mode; gradients are dropped as they come, as LOMO drops them."""
    device = torch.device(args.device)
    config = CollieConfig(model={"path": "none"}, train={"activation_checkpointing": mode})
    run = Run(config, Path("none"), device)
    run.resolved["compile"] = args.compile
    run_blocks = runner_for(list(model.blocks.values()), run)

    def step(ids: Tensor) -> None:
        ctx = model.prepare_context(Context.build(ids))
        ops.prepare(ctx)
        run_blocks(model.embed(ids, ctx), ctx).sum().backward()

    return step


def timed(step: Callable[[Tensor], None], ids: Tensor, steps: int) -> tuple[float, int]:
    """(seconds a step, peak bytes beside what is there before)."""
    cuda = ids.is_cuda
    before = 0
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    begin = time.perf_counter()
    for _ in range(steps):
        step(ids)
    if cuda:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - begin) / steps
    return seconds, torch.cuda.max_memory_allocated() - before if cuda else 0


def measure(args: argparse.Namespace, shape: str) -> list[dict[str, Any]]:
    """Every mode on rows of one shape."""
    rows, length = map(int, shape.split("x"))
    model, ops = make(args)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    if args.compile:
        for block in model.blocks.values():  # type: ignore[operator]
            block.compile()
    ids = torch.randint(0, 128, (rows, length), device=args.device)
    found: dict[str, dict[str, Any]] = {}
    steps: dict[str, Callable[[Tensor], None]] = {}
    for mode in args.modes:
        found[mode] = {"shape": shape, "mode": mode}
        try:
            steps[mode] = step_of(args, model, ops, mode)
            found[mode]["first_s"] = timed(steps[mode], ids, 1)[0]
            timed(steps[mode], ids, 1)
        except Exception as error:
            found[mode]["reason"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            steps.pop(mode, None)
    seconds: dict[str, list[float]] = {mode: [] for mode in steps}
    for _ in range(args.windows):
        for mode, step in steps.items():
            each, peak = timed(step, ids, args.window)
            seconds[mode].append(each)
            found[mode]["peak_mib"] = peak / 2**20
    for mode, times in seconds.items():
        found[mode]["ms_a_block"] = statistics.median(times) * 1e3 / args.blocks
        found[mode]["mib_a_block"] = found[mode]["peak_mib"] / args.blocks
    return list(found.values())


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--modes", type=lambda text: text.split(","), default=list(MODES))
    parser.add_argument("--shapes", default="8x2048,1x32768", help="rows x length, several with commas")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--window", type=int, default=2, help="steps of a window")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--output", type=Path, help="write the rows as JSON")
    args = parser.parse_args()
    where = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{where}, torch {torch.__version__}, {args.blocks} blocks of width {args.width}")
    rows = []
    for shape in args.shapes.split(","):
        for row in measure(args, shape):
            rows.append(row)
            figures = row.get("reason") or (
                f"{row['ms_a_block']:8.2f} ms a block, peak {row['mib_a_block']:8.1f} MiB a block, "
                f"first step {row['first_s']:.1f} s"
            )
            print(f"{row['shape']:10} {row['mode']:10} {figures}", flush=True)
    if args.output:
        args.output.write_text(json.dumps({"device": where, "torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
