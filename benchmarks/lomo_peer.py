"""LOMO, LOMO with clipping and AdaLomo in a plain loop: our classes beside those of the authors' lomo-optim.

Both train a copy of one transformers model on the same tokens, in turns: ten steps each after which their
parameters are compared, then windows of a few steps; the table shows medians over windows and the ratio of
step times, window by window.

    python benchmarks/lomo_peer.py                         # CPU, fp32, 24 layers of width 64
    python benchmarks/lomo_peer.py --hidden 2048 --batch 4 --length 512    # CUDA, bf16
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import lomo_optim
import torch
from torch import Tensor, nn

from collie_methods.lomo import AdaLomo, Lomo

#: name -> (our class, theirs, lr, clip_grad_norm)
CASES: dict[str, tuple[Any, Any, float, float | None]] = {
    "LOMO": (Lomo, lomo_optim.Lomo, 1e-2, None),
    "LOMO, clipped": (Lomo, lomo_optim.Lomo, 1e-2, 0.5),
    "AdaLomo": (AdaLomo, lomo_optim.AdaLomo, 1e-3, None),
}
COMPARED = 10  # steps before the comparison
Step = Callable[[Tensor], None]


def our_step(model: nn.Module, kind: Any, lr: float, clip: float | None) -> Step:
    """A step with one of our classes."""
    optimizer = kind(model, lr=lr, clip_grad_norm=clip)

    def step(ids: Tensor) -> None:
        optimizer.fused_backward(model(input_ids=ids, labels=ids).loss)

    return step


def their_step(model: nn.Module, kind: Any, lr: float, clip: float | None) -> Step:
    """A step with one of the package's classes, as its own documentation shows."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    # its AdaLomo makes its states by `.cuda()`; nothing else in it needs a GPU
    with patch.object(torch.Tensor, "cuda", lambda self: self) if on_cpu else nullcontext():
        optimizer = kind(model, lr=lr, clip_grad_norm=clip)

    def step(ids: Tensor) -> None:
        loss = model(input_ids=ids, labels=ids).loss
        if clip is not None:
            optimizer.grad_norm(loss)
        optimizer.fused_backward(loss, lr)

    return step


def new_model(args: argparse.Namespace) -> nn.Module:
    """The model that both begin with."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 8 // 3 // 16 * 16,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 16 if args.hidden < 1024 else args.hidden // 128,
        max_position_embeddings=args.length,
    )
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    return LlamaForCausalLM(config).to(args.device, dtype)


def measure(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """One line of the table."""
    ours, theirs, lr, clip = CASES[name]
    model = new_model(args)
    mine, peer = copy.deepcopy(model), copy.deepcopy(model)
    steps = {"ours": our_step(mine, ours, lr, clip), "theirs": their_step(peer, theirs, lr, clip)}
    generator = torch.Generator().manual_seed(0)
    size = (COMPARED, args.batch, args.length)
    batches = torch.randint(0, args.vocabulary, size, generator=generator).to(args.device)
    for step in steps.values():
        window(step, batches, COMPARED)
    pairs = zip(mine.parameters(), peer.parameters(), strict=True)
    difference = max(float((one - other).detach().abs().max()) for one, other in pairs)
    seconds: dict[str, list[float]] = {who: [] for who in steps}
    for _ in range(args.windows):
        for who, step in steps.items():
            seconds[who].append(window(step, batches, args.window) / args.window)
    ratios = [one / other for one, other in zip(seconds["ours"], seconds["theirs"], strict=True)]
    return {
        "name": name,
        "ours_s": statistics.median(seconds["ours"]),
        "theirs_s": statistics.median(seconds["theirs"]),
        "ours_over_theirs": statistics.median(ratios),
        "largest_difference": difference,
    }


def window(step: Step, batches: Tensor, count: int) -> float:
    """Seconds of so many steps."""
    wait = torch.cuda.synchronize if batches.is_cuda else lambda: None
    wait()
    begin = time.perf_counter()
    for number in range(count):
        step(batches[number % len(batches)])
    wait()
    return time.perf_counter() - begin


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=64, help="width, a multiple of 16")
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--window", type=int, default=3)
    parser.add_argument("--windows", type=int, default=15)
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = [measure(args, name) for name in CASES]
    if args.json:
        print(json.dumps(rows))
        return
    cuda = args.device == "cuda"
    device = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    shape = f"{args.layers} layers of {args.hidden}, {args.batch} x {args.length} tokens"
    print(f"{device}, torch {torch.__version__}, {shape}, {args.windows} windows of {args.window} steps")
    for row in rows:
        times = f"ours {row['ours_s'] * 1e3:8.1f} ms  lomo-optim {row['theirs_s'] * 1e3:8.1f} ms"
        ratio = f"ours/its {row['ours_over_theirs']:.3f}"
        print(f"{row['name']:14} {times}  {ratio}  largest difference {row['largest_difference']:.1e}")


if __name__ == "__main__":
    main()
