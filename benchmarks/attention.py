"""Attention, forward and backward: every implementation in turns, on whole rows and on packed ones.

One that is not installed or fails is named with the reason; the others are measured all the same.

    python benchmarks/attention.py                                    # CUDA, LLaMA-7B shapes, bf16
    python benchmarks/attention.py --device cpu --shapes 1x64,1x128 --heads 2 --width 16
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from collie_core.ops import Context
from collie_core.ops.attention import Attention
from collie_core.ops.context import Records
from collie_core.ops.implementations import ATTENTION

MEAN_RECORD = 400


@dataclass
class Contestant:
    """An implementation on one kind of rows: its times, or why it has none."""

    name: str
    reason: str = ""
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0


@dataclass(frozen=True)
class Case:
    """Rows of one shape; packed: of records, MEAN_RECORD tokens long on average, else each one record."""

    rows: int
    length: int
    packed: bool

    @property
    def title(self) -> str:
        """Such as `8 x 2,048, packed`."""
        return f"{self.rows} x {self.length:,}" + (", packed" if self.packed else "")

    def segments(self) -> Tensor:
        """int64 (rows, length): records of exponentially distributed lengths."""
        generator = torch.Generator().manual_seed(0)
        breaks = torch.rand(self.rows, self.length, generator=generator) < 1 / MEAN_RECORD
        return breaks.long().cumsum(1) + 1

    def context(self, device: str) -> Context:
        """What blocks get."""
        ids = torch.zeros(self.rows, self.length, dtype=torch.int64, device=device)
        if not self.packed:
            return Context.build(ids)
        segments, records = self.segments(), Records.of(self.segments())
        on_device = Records(records.starts.to(device), records.longest)
        return Context.build(ids, segments=segments.to(device), records=on_device)

    def flop(self, heads: int, width: int) -> float:
        """Of forward (4 for each visible score and channel) and backward (2.5 times as many)."""
        lengths = [self.length] * self.rows
        if self.packed:
            lengths = [
                int(count) for row in self.segments() for count in torch.unique(row, return_counts=True)[1]
            ]
        return 3.5 * 2 * heads * width * sum(float(length) ** 2 for length in lengths)


def measure(args: argparse.Namespace, case: Case) -> list[Contestant]:
    """Every implementation on the rows of a case."""
    device, dtype = args.device, torch.float32 if args.device == "cpu" else torch.bfloat16
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(case.rows, heads, case.length, args.width) for heads in (args.heads, *[args.kv_heads] * 2)]
    q, k, v, gradient = (
        torch.randn(shape, generator=generator, device=device, dtype=dtype) for shape in [*shapes, shapes[0]]
    )
    for tensor in (q, k, v):
        tensor.requires_grad_()

    def step(attend: Attention, ctx: Context) -> None:
        torch.autograd.grad(attend(q, k, v, ctx), (q, k, v), gradient)

    contestants, steps = [], {}
    for name in args.names:
        contestant = Contestant(name)
        contestants.append(contestant)
        try:
            contestant.reason = ATTENTION[name].problem(torch.device(device), dtype, False)
            if not contestant.reason:
                attend, ctx = ATTENTION[name].build(), case.context(device)
                ATTENTION[name].prepare(ctx)
                steps[name] = lambda attend=attend, ctx=ctx: step(attend, ctx)
                contestant.peak_bytes = peak(steps[name], device)
        except Exception as error:  # that of a package that does not fit is no failure of the others
            contestant.reason = f"{type(error).__name__}: {error}"
            steps.pop(name, None)
            if device == "cuda":
                torch.cuda.empty_cache()
    for _ in range(args.windows):
        for contestant in contestants:
            if contestant.name in steps:
                contestant.seconds.append(window(steps[contestant.name], args.window, device))
    return contestants


def peak(step: Callable[[], None], device: str) -> int:
    """Warm up, and return the device memory that a step takes beside what is there."""
    step()
    if device == "cpu":
        return 0
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def window(step: Callable[[], None], steps: int, device: str) -> float:
    """Seconds a step, over a few of them."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(steps):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / steps


def rows_of(args: argparse.Namespace, case: Case, contestants: list[Contestant]) -> list[dict[str, Any]]:
    """What is printed and written of a case."""
    rows = []
    for contestant in contestants:
        row: dict[str, Any] = {"case": case.title, "name": contestant.name}
        if contestant.seconds:
            seconds = statistics.median(contestant.seconds)
            row |= {
                "ms": seconds * 1e3,
                "tflop_s": case.flop(args.heads, args.width) / seconds / 1e12,
                "peak_mib": contestant.peak_bytes / 2**20,
            }
        else:
            row["reason"] = contestant.reason.splitlines()[0][:200]
        rows.append(row)
    return rows


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--names", type=lambda text: text.split(","), default=list(ATTENTION))
    parser.add_argument("--shapes", default="8x2048,1x32768", help="rows x length, several with commas")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, help="fewer than --heads: grouped-query attention")
    parser.add_argument("--width", type=int, default=128, help="channels of a head")
    parser.add_argument("--windows", type=int, default=7)
    parser.add_argument("--window", type=int, default=5, help="steps of a window")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--output", type=Path, help="write the rows as JSON")
    args = parser.parse_args()
    args.kv_heads = args.kv_heads or args.heads
    where = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    heads = f"{args.heads} heads ({args.kv_heads} of keys) of {args.width} channels"
    print(f"{where}, torch {torch.__version__}, {heads}, medians of {args.windows} windows of {args.window}")
    found = []
    for shape in args.shapes.split(","):
        count, length = map(int, shape.split("x"))
        for packed in (False, True):
            case = Case(count, length, packed)
            rows = rows_of(args, case, measure(args, case))
            for row in rows:
                figures = (
                    f"{row['ms']:9.2f} ms {row['tflop_s']:7.1f} TFLOP/s {row['peak_mib']:8.0f} MiB"
                    if "ms" in row
                    else row["reason"]
                )
                print(f"{row['case']:20} {row['name']:20} {figures}", flush=True)
            found += rows
    if args.output:
        args.output.write_text(json.dumps({"device": where, "torch": torch.__version__, "rows": found}))


if __name__ == "__main__":
    main()
