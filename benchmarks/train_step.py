"""A training step with LOMO: our Trainer, a bare PyTorch loop on the same module, transformers + lomo-optim.

The three take turns in windows of a few steps within one process, on the same weights and tokens; the table
shows medians over windows and the ratio of step times, window by window.  Ours runs as a user's run does:
`Trainer(config).train()`, data reader, metrics, monitors and checks included.

    python benchmarks/train_step.py                       # CPU, a small model, fp32
    python benchmarks/train_step.py --shape 7b --batch 4  # CUDA, LLaMA-7B shapes, bf16
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from llama import SHAPES, Ids, flop_per_token, hf_config, mfu
from torch import Tensor, nn

from collie_core import AutoModelForCausalLM, CollieConfig, Trainer
from collie_core.plugin import Run, hookimpl

LR = 1e-3
Step = Callable[[Tensor, Tensor], Any]


@dataclass
class Contestant:
    """One of the three: its step and what was measured of it."""

    name: str
    step: Step | None
    weight_bytes: int = 0
    seconds: list[float] = field(default_factory=list)  # per step, by window
    peak_bytes: int = 0


def bare_loop(model: nn.Module) -> Step:
    """In-backward SGD in a dozen lines, nothing else."""

    def update(parameter: Tensor) -> None:
        with torch.no_grad():
            assert parameter.grad is not None
            parameter.add_(parameter.grad, alpha=-LR)
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(update)

    def step(input_ids: Tensor, labels: Tensor) -> None:
        model(input_ids, labels=labels).loss.backward()

    return step


def lomo_optim(model: nn.Module) -> Step:
    """transformers with the published lomo-optim package."""
    from lomo_optim import Lomo

    optimizer = Lomo(model, lr=LR)

    def step(input_ids: Tensor, labels: Tensor) -> None:
        optimizer.fused_backward(model(input_ids=input_ids, labels=labels).loss, LR)

    return step


class Turns:
    """After each window of our run's steps, the others do as many; every window is timed."""

    def __init__(
        self,
        args: argparse.Namespace,
        ours: Contestant,
        others: list[Contestant],
        batch: tuple[Tensor, Tensor],
    ) -> None:
        self.args, self.ours, self.others, self.batch = args, ours, others, batch
        self.first = args.warmup
        self.begin = 0.0

    @hookimpl
    def collie_step_end(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        if step < self.first:
            if step == self.first - 1:
                for other in self.others:
                    self._window(other, self.first)
                    other.seconds.clear()
                self._start()
            return
        if (step - self.first + 1) % self.args.window == 0:
            self._record(self.ours)
            for other in self.others:
                self._window(other, self.args.window)
            self._start()

    def _window(self, contestant: Contestant, steps: int) -> None:
        assert contestant.step is not None
        self._start()
        for _ in range(steps):
            contestant.step(*self.batch)
        self._record(contestant, steps)

    def _start(self) -> None:
        if self.args.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.resident = torch.cuda.memory_allocated()
        self.begin = time.perf_counter()

    def _record(self, contestant: Contestant, steps: int | None = None) -> None:
        if self.args.device == "cuda":
            torch.cuda.synchronize()
            own = torch.cuda.max_memory_allocated() - self.resident + contestant.weight_bytes
            contestant.peak_bytes = max(contestant.peak_bytes, own)
        contestant.seconds.append((time.perf_counter() - self.begin) / (steps or self.args.window))


def run(args: argparse.Namespace, folder: Path) -> list[Contestant]:
    """Make the model, let the three take turns, return what was measured."""
    from transformers import LlamaForCausalLM

    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    shape = SHAPES[args.shape]
    model = AutoModelForCausalLM.from_config(hf_config(shape), dtype=dtype, seed=0)
    model.save_pretrained(folder / "model")
    model.to(args.device)
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    stock = LlamaForCausalLM.from_pretrained(folder / "model", dtype=dtype, attn_implementation="sdpa").to(
        args.device
    )
    if args.recompute:
        stock.gradient_checkpointing_enable()
    ours = Contestant("collie Trainer", None, weight_bytes)
    others = [Contestant("transformers + lomo-optim", lomo_optim(stock.train()), weight_bytes)]
    if not args.recompute:
        others.insert(0, Contestant("bare loop, same module", bare_loop(model.train()), weight_bytes))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, shape["vocab_size"], (args.batch, args.length), generator=generator)
    records = [{"tokens": row.tolist(), "labels": row.tolist()} for row in rows]
    batch = rows.to(args.device), rows.to(args.device)
    config = CollieConfig(
        model={"path": str(folder / "model"), "dtype": str(dtype).removeprefix("torch.")},
        optimizer={"name": "lomo", "lr": LR},
        schedule="constant",
        data={"max_length": args.length},
        train={
            "micro_batch_size": args.batch,
            "epochs": args.warmup + args.window * args.windows,
            "activation_checkpointing": "full" if args.recompute else "none",
            "compile": args.compile,
        },
        monitors=["console"],
        output_dir=str(folder / "run"),
    )
    turns = Turns(args, ours, others, batch)
    Trainer(config, train_dataset=records, tokenizer=Ids(shape["vocab_size"]), callbacks=[turns]).train()
    return [ours, *others]


def table(args: argparse.Namespace, contestants: list[Contestant]) -> list[dict[str, Any]]:
    """Medians and ratios; MFU counts (6 N + 6 layers hidden length) flop a token, N without embedding."""
    shape = SHAPES[args.shape]
    flop = flop_per_token(shape, args.length)
    ours, rows = contestants[0], []
    for contestant in contestants:
        seconds = statistics.median(contestant.seconds)
        ratios = [mine / other for mine, other in zip(ours.seconds, contestant.seconds, strict=False)]
        tokens = args.batch * args.length / seconds
        row = {
            "name": contestant.name,
            "step_s": seconds,
            "tok_s": tokens,
            "ours_over_it": statistics.median(ratios),
        }
        if args.device == "cuda":
            row |= {"mfu": mfu(tokens, flop), "peak_gib": contestant.peak_bytes / 2**30}
        rows.append(row)
    return rows


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--window", type=int, default=5)
    parser.add_argument("--windows", type=int, default=15)
    parser.add_argument(
        "--recompute", action="store_true", help="full activation checkpointing for ours and the peer"
    )
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = table(args, run(args, Path(folder)))
    if args.json:
        print(json.dumps(rows))
        return
    device = (
        torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    )
    work = f"{args.shape}, {args.batch} x {args.length} tokens, {args.windows} windows of {args.window}"
    print(f"{device}, torch {torch.__version__}, {work}")
    for row in rows:
        extra = f"  MFU {row['mfu'] or 0:.3f}  peak {row['peak_gib']:.1f} GiB" if "mfu" in row else ""
        speed = f"{row['step_s'] * 1e3:9.1f} ms/step {row['tok_s']:9.0f} tok/s"
        print(f"{row['name']:28} {speed}  ours/it {row['ours_over_it']:.3f}{extra}")


if __name__ == "__main__":
    main()
