"""One GPU near its limits: our Trainer and its peers on LLaMA shapes with random weights, in bf16 and float8.

Every contestant runs in a process of its own, one after the other: ours through `Trainer(config)`, the peers
as bare loops over transformers with gradient checkpointing.  Printed, as soon as it is known: tokens a second
(median of three windows, padding not counted), MFU, peak memory, the ratio to the fastest peer of the row,
and whether what is wanted was reached.  Within a row peers come first, so that ours have a ratio.

    python benchmarks/h200.py --list
    python benchmarks/h200.py --rows lomo lora:float8 --time-limit 590 --output lomo.json
    python benchmarks/h200.py --device cpu --shape tiny --rows lomo    # a smoke run

MFU counts (6 N + 6 layers hidden length) flop a token, 4 instead of 6 with frozen weights, N without the
input embedding and nothing for recomputation, against 790 Tflop/s.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from h200_rows import ROWS, Ours, Peer, Row, chosen

LIBRARIES = (
    *("torch", "triton", "transformers", "torchao", "lomo-optim", "liger-kernel", "peft", "bitsandbytes"),
    "unsloth",
)
SMOKE = ["lomo:bf16", "lomo:lomo-optim"]
TINY = {"shape": "tiny", "batch": 2, "length": 64}


def main() -> int:
    """Parse, run, print; 1 where a contestant failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", nargs="+", metavar="ROW[:CONTESTANT]", help="or patterns; default: all, on the CPU two"
    )
    parser.add_argument("--list", action="store_true", help="what there is to measure")
    parser.add_argument("--time-limit", type=float, default=None, help="seconds for all of it")
    parser.add_argument("--window", type=float, default=4.0, help="seconds of each window, at least")
    parser.add_argument("--device", choices=["cpu", "cuda"], default=None)
    parser.add_argument("--shape", choices=["full", "tiny"], default=None, help="tiny: for a smoke run")
    parser.add_argument("--output", type=Path, default=None, help="a file for all figures, as JSON")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # measure it in this process
    args = parser.parse_args()
    import torch

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.shape = args.shape or ("full" if args.device == "cuda" else "tiny")
    all_rows = ["*"] if args.list or args.device == "cuda" else SMOKE
    try:
        pairs = chosen(args.rows or all_rows)
    except LookupError as error:
        parser.error(str(error))
    if args.list:
        print("\n".join(f"{row.name}:{one.name}  {wanted(one)}" for row, one in pairs))
        return 0
    if args.one:
        from h200_measure import measure

        row, one = pairs[0]
        print(json.dumps(measure(scaled(row, args.shape), one, args.device, args.window)))
        return 0
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    report: dict[str, Any] = {"device": name, "versions": versions(), "results": []}
    print(name, report["versions"], flush=True)
    begin = time.perf_counter()
    for row in ROWS:
        ordered = sorted((one for of, one in pairs if of is row), key=lambda one: isinstance(one, Ours))
        fastest: float | None = None
        for one in ordered:
            left = None if args.time_limit is None else args.time_limit - (time.perf_counter() - begin)
            limits = wanted(one) if args.shape == "full" else {}
            found = {"row": row.name, "name": one.name, "wanted": limits, **child(args, row, one, left)}
            if isinstance(one, Peer):
                fastest = max(filter(None, [fastest, found.get("tok_s")]), default=None)
            else:
                found["over_peer"] = found["tok_s"] / fastest if fastest and "tok_s" in found else None
                found["reached"] = reached(limits, found)
            report["results"].append(found)
            print(line(found), flush=True)
            if args.output is not None:
                args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 1 if any("error" in found for found in report["results"]) else 0


def scaled(row: Row, shape: str) -> Row:
    """The row, or one as small as a smoke run's."""
    return dataclasses.replace(row, **TINY) if shape == "tiny" else row  # type: ignore[arg-type]


def child(args: argparse.Namespace, row: Row, one: Ours | Peer, left: float | None) -> dict[str, Any]:
    """What a fresh process measures of one contestant, within the time that is left."""
    if left is not None and left <= 0:
        return {"skipped": "out of time"}
    command = [sys.executable, __file__, "--one", "--rows", f"{row.name}:{one.name}"]
    command += ["--device", args.device, "--shape", args.shape, "--window", str(args.window)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    begin = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=left, env=env)
    except subprocess.TimeoutExpired:
        return {"skipped": "out of time"}
    seconds = {"seconds": round(time.perf_counter() - begin, 1)}
    if done.returncode or not done.stdout.strip():
        return {"error": f"exit status {done.returncode}: {done.stderr[-600:]}", **seconds}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {**found, **seconds}


def wanted(one: Ours | Peer) -> dict[str, float]:
    """The least tokens a second and the most memory, where there is a limit."""
    if isinstance(one, Peer):
        return {}
    limits = {"tok_s": one.tok_s, "gib": one.gib}
    return {key: limit for key, limit in limits.items() if limit is not None}


def reached(limits: dict[str, float], found: dict[str, Any]) -> bool | None:
    """Whether what is wanted was reached; None where nothing is, or nothing was measured."""
    if not limits or "tok_s" not in found:
        return None
    fast = found["tok_s"] >= limits.get("tok_s", 0.0)
    return fast and ("gib" not in limits or found["peak_gib"] <= limits["gib"])


def line(found: dict[str, Any]) -> str:
    """One result as text."""
    text = f"{found['row']:14} {found['name']:20}"
    for key in ("error", "skipped"):
        if key in found:
            return f"{text} {key}: {found[key]}"
    text += f" {found['tok_s']:9,.0f} tok/s"
    if found["mfu"] is not None:
        text += f"  MFU {found['mfu']:.3f}  peak {found['peak_gib']:.1f} GiB"
        text += f" (from start {found['peak_gib_from_start']:.1f}, reserved {found['reserved_gib']:.1f})"
    if found.get("over_peer"):
        text += f"  {found['over_peer']:.2f} x peer"
    if found["wanted"]:
        text += f"  wanted {found['wanted']}: {'reached' if found['reached'] else 'NOT reached'}"
    resolved = found.get("resolved", {})
    said = {key: resolved[key] for key in ("activation_checkpointing", "ops", "float8") if key in resolved}
    return f"{text}  {said or ''}  [{found['seconds']} s]"


def versions() -> dict[str, str]:
    """Of the libraries that are installed."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    sys.exit(main())
