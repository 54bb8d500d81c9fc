"""Loading and saving a model: ours beside transformers, seconds and peak memory, each in a fresh process.

    python benchmarks/load.py                # 1 GB in fp32, files in the page cache
    python benchmarks/load.py --gigabytes 4 --dtype bfloat16 --rounds 7

A round runs every measurement once, in turn, so that a busy machine slows all of them; the table shows
medians, and the median over rounds of ours / transformers.  Extra memory is the rise of the process's peak
resident memory (VmHWM) beyond the model's own size; warm-up with a tiny model is not counted.
First use reads every parameter once: transformers, and we, map files whose dtype is the wanted one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 8000,
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_attention_heads": 16,
}
BYTES_PER_LAYER = (4 * 2048 * 2048 + 3 * 2048 * 5504) * 4  # fp32
CONTESTANTS = ("ours", "transformers")


def peak_bytes() -> int:
    """Peak resident memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def measure(contestant: str, paths: Sequence[Path], dtype_name: str) -> dict[str, float]:
    """Seconds and extra memory of loading and saving, in this process."""
    import torch

    source, tiny, out = paths
    dtype = getattr(torch, dtype_name)
    if contestant == "ours":
        from collie_core import AutoModelForCausalLM

        def load(folder: Path) -> Any:
            return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    else:
        from transformers import AutoModelForCausalLM as StockModel

        def load(folder: Path) -> Any:
            return StockModel.from_pretrained(folder, dtype=dtype)

    load(tiny).save_pretrained(out / "tiny")
    before, start = peak_bytes(), time.perf_counter()
    model = load(source)
    loaded = time.perf_counter()
    for parameter in model.parameters():
        parameter.detach().sum()  # both map files, so that pages are read when they are first used
    used, after_load = time.perf_counter(), peak_bytes()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    begin = time.perf_counter()
    model.save_pretrained(out / "model")
    saved = time.perf_counter()
    return {
        "load_seconds": loaded - start,
        "load_and_first_use_seconds": used - start,
        "load_extra_mb": (after_load - before - size) / 1e6,
        "save_seconds": saved - begin,
        "save_extra_mb": (peak_bytes() - after_load) / 1e6,
    }


def prepare(folder: Path, gigabytes: float, dtype_name: str) -> tuple[Path, Path]:
    """A model of about `gigabytes` in fp32 (stored in `dtype`), and a tiny one."""
    import torch

    from collie_core import AutoModelForCausalLM

    layers = max(1, round((gigabytes * 1e9 - 2 * 8000 * 2048 * 4) / BYTES_PER_LAYER))
    tiny = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    for name, changes in (("source", {"num_hidden_layers": layers}), ("tiny", tiny)):
        model = AutoModelForCausalLM.from_config(CONFIG | changes, dtype=getattr(torch, dtype_name))
        model.save_pretrained(folder / name)
    return folder / "source", folder / "tiny"


def run_child(contestant: str, source: Path, tiny: Path, out: Path, dtype: str) -> dict[str, float]:
    """`measure` in a fresh process."""
    paths = [str(path) for path in (source, tiny, out)]
    command = [sys.executable, __file__, "--child", contestant, *paths, "--dtype", dtype]
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--stored", choices=["float32", "bfloat16", "float16"], help="default: --dtype")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to put the files (default: a temporary folder)")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        contestant, *paths = args.child
        print(json.dumps(measure(contestant, [Path(path) for path in paths], args.dtype)))
        return
    figures: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in CONTESTANTS}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source, tiny = prepare(Path(folder), args.gigabytes, args.stored or args.dtype)
        for _ in range(args.rounds):
            for name in CONTESTANTS:
                with tempfile.TemporaryDirectory(dir=folder) as out:
                    for figure, value in run_child(name, source, tiny, Path(out), args.dtype).items():
                        figures[name][figure].append(value)
    print(f"{'':28}{'ours':>10}{'transformers':>14}{'ratio':>8}")
    for figure in figures["ours"]:
        ours, theirs = (figures[name][figure] for name in CONTESTANTS)
        ratio = (
            statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
            if "seconds" in figure
            else None
        )
        print(
            f"{figure:28}{statistics.median(ours):10.2f}{statistics.median(theirs):14.2f}"
            + (f"{ratio:8.2f}" if ratio is not None else "")
        )


if __name__ == "__main__":
    main()
