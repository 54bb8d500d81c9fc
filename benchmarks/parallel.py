"""Training steps of each layout beside one process and beside torch's bare engine, and what each rank holds.

Every layout is a job of its own with real processes (gloo, CPU).  In it our run, `Trainer(config).train()`, a
bare loop over the same module under the bare engine, and a bare loop in one of the processes, with as many
threads, take turns in windows of a few steps; ratios are of neighbouring windows.  The bare engine is DDP for
zero_stage 0, DeepSpeed where that is the layout, and torch's own tensor parallelism or pipeline (with FSDP2
over dp) for tp and pp, which are measured beside FSDP2 with as many processes too; for others it is FSDP2.
Then ours and the bare engine run alone, in turns, for the peak of resident memory and the bytes of live
weights, gradients and optimizer states at the update, beside what the layout is expected to hold.

    python benchmarks/parallel.py --layouts "dp2 zero 3" tp2
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bare_engines import LR, SHAPE, Step, bare_step, engines, rows, stretches
from llama import Ids, hf_config, run_job
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from collie_core import AutoModelForCausalLM, CollieConfig, Trainer
from collie_core.plugin import Run, hookimpl

LAYOUTS: dict[str, dict[str, Any]] = {
    **{f"dp2 zero {stage}": {"dp_size": 2, "layout": {"zero_stage": stage}} for stage in range(4)},
    "tp2": {"tp_size": 2, "layout": {"sequence_parallel": False}},
    "tp2 sequence": {"tp_size": 2},
    "pp2 1f1b": {"pp_size": 2},
    "pp2 1f1b by compute": {"pp_size": 2, "layout": {"pp_partition": "compute"}},
    "pp2 gpipe": {"pp_size": 2, "layout": {"pp_schedule": "gpipe"}},
    "pp2 interleaved": {"pp_size": 2, "layout": {"pp_schedule": "interleaved"}},
    "dp2 x tp2 zero 3": {"dp_size": 2, "tp_size": 2, "layout": {"zero_stage": 3}},
    "dp2 x pp2 zero 2": {"dp_size": 2, "pp_size": 2, "layout": {"zero_stage": 2}},
    **{
        f"deepspeed zero {stage}": {"dp_size": 2, "layout": {"name": "deepspeed", "zero_stage": stage}}
        for stage in (2, 3)
    },
}


# ---------------------------------------------------------------- in a process of a job
class Turns:
    """After each window of our run's steps the others do as many; every window is timed, but for its first
    step, which finds the caches full of another's model."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        self.job = job
        self.engines = engines(job["changes"])
        self.seconds: dict[str, list[float]] = {who: [] for who in ("ours", *self.engines, "one process")}
        self.steps: dict[str, Step] = {}
        self.begin = 0.0

    @hookimpl
    def collie_step_end(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        window, first = self.job["window"], self.job["warmup"]
        place = (step - first) % (window + 1)
        if step == first:
            self.steps = {engine: bare_step(self.job, engine) for engine in self.engines}
            if run.first:
                self.steps["one process"] = bare_step(self.job, None)
            self._others(first)
            for times in self.seconds.values():
                times.clear()
        elif step > first and place == 0:
            self.seconds["ours"].append((time.perf_counter() - self.begin) / window)
            self._others(window)
        elif step < first or place != 1:
            return
        dist.barrier()
        self.begin = time.perf_counter()

    def _others(self, count: int) -> None:
        for name, step in self.steps.items():
            step()
            if name in self.engines:
                dist.barrier()
            begin = time.perf_counter()
            for _ in range(count):
                step()
            self.seconds[name].append((time.perf_counter() - begin) / count)


def train(job: Mapping[str, Any], steps: int, callbacks: list[Any]) -> None:
    """Our run; an epoch is one step."""
    batch = rows(job).tolist()
    config = CollieConfig(
        model={"path": job["model"], "dtype": "float32"},
        optimizer={"name": "adamw", "lr": LR},
        schedule="constant",
        data={"max_length": job["length"]},
        train={"micro_batch_size": job["batch"] // job["changes"].get("dp_size", 1), "epochs": steps},
        monitors=["console"],
        output_dir=str(Path(job["folder"]) / f"run-{job['kind']}"),
        **job["changes"],
    )
    records = [{"tokens": row, "labels": row} for row in batch]
    tokenizer: Any = Ids(SHAPE["vocab_size"])
    Trainer(config, train_dataset=records, tokenizer=tokenizer, callbacks=callbacks).train()


class Held:
    """Bytes of what an optimizer that has just stepped holds on this rank, the largest seen."""

    def __init__(self) -> None:
        self.bytes = {"weights": 0, "gradients": 0, "states": 0}
        self._handle = register_optimizer_step_post_hook(self._count)

    def _count(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        states = [v for p in parameters for v in optimizer.state[p].values() if v.ndim]
        found = {
            "weights": sum(map(_bytes, parameters)),
            "gradients": sum(_bytes(p.grad) for p in parameters if p.grad is not None),
            "states": sum(map(_bytes, states)),
        }
        self.bytes = {name: max(self.bytes[name], value) for name, value in found.items()}


def _bytes(tensor: Tensor) -> int:
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.numel() * local.element_size()


def _resident(key: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise LookupError(key)


class Peak:
    """The peak of resident memory in the steps: neither in loading nor in saving."""

    peak = 0

    @hookimpl
    def collie_run_start(self, run: Run) -> None:
        _reset_peak()

    @hookimpl
    def collie_step_end(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        self.peak = _resident("VmHWM")


def _reset_peak() -> None:
    """Count from here, without what loading has freed and malloc keeps for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def work(job: Mapping[str, Any]) -> None:
    """What a process of a job does; its findings go into a file for each rank."""
    rank = int(os.environ["RANK"])
    found: dict[str, Any]
    if job["kind"] == "time":
        turns = Turns(job)
        train(job, job["warmup"] + (job["window"] + 1) * job["windows"], [turns])
        found = turns.seconds
    else:
        held, before = Held(), _resident("VmRSS")
        if job["kind"] == "ours":
            steps = Peak()
            train(job, 4, [steps])
            peak = steps.peak
        else:
            dist.init_process_group("gloo")
            step = bare_step(job, engines(job["changes"])[0])
            _reset_peak()
            for _ in range(4):
                step()
            peak = _resident("VmHWM")
            dist.destroy_process_group()  # an interpreter that ends over gloo's threads may be aborted
        found = {**held.bytes, "peak": peak - before}
    (Path(job["folder"]) / f"{job['kind']}-{rank}.json").write_text(json.dumps(found))


# ---------------------------------------------------------------- the jobs
def start(job: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """Run one job; what each rank found."""
    changes = job["changes"]
    processes = changes.get("dp_size", 1) * changes.get("tp_size", 1) * changes.get("pp_size", 1)
    folder = Path(job["folder"])
    folder.mkdir(exist_ok=True)
    status = run_job(__file__, {**job, "kind": kind}, folder / f"{kind}.json", processes)
    if status:
        sys.exit(f"{job['name']}: the job ended with status {status}")
    return [json.loads((folder / f"{kind}-{rank}.json").read_text()) for rank in range(processes)]


def expected(changes: Mapping[str, Any], model: nn.Module) -> list[int]:
    """Bytes of weights that each stage's ranks keep: matrices cut by tp, all by dp where ZeRO is on."""
    pp, options = changes.get("pp_size", 1), changes.get("layout", {})
    dp = changes.get("dp_size", 1) if options.get("zero_stage", 0) else 1

    def size(module: Any) -> int:
        total = 0
        for parameter in module.parameters():
            cut = changes.get("tp_size", 1) if parameter.ndim == 2 else 1
            total += parameter.numel() * parameter.element_size() // cut // dp
        return total

    whole: Any = model
    blocks = list(whole.blocks.values())
    kept = [0] * pp
    for number, stretch in enumerate(stretches(changes, whole)):
        kept[number % pp] += sum(size(blocks[index]) for index in stretch)
    kept[0] += size(whole.embed)
    kept[-1] += size(whole.head)
    return kept


def measure(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """A row for each layout."""
    model = AutoModelForCausalLM.from_config(hf_config(SHAPE), dtype=torch.float32, seed=0)
    model.save_pretrained(folder / "model")
    found = []
    for number, name in enumerate(args.layouts):
        job = {
            "name": name,
            "changes": LAYOUTS[name],
            "model": str(folder / "model"),
            "folder": str(folder / f"job-{number}"),
            **{key: getattr(args, key) for key in ("batch", "length", "warmup", "window", "windows")},
        }
        seconds = start(job, "time")[0]
        kinds = ("ours", "engine")
        runs: dict[str, list[list[dict[str, Any]]]] = {kind: [] for kind in kinds}
        for repeat, kind in itertools.product(range(args.repeats), kinds):
            runs[kind].append(start({**job, "folder": f"{job['folder']}-{repeat}"}, kind))
        ours = runs["ours"][0]
        stages = expected(LAYOUTS[name], model)
        per_stage = len(ours) // len(stages)
        found.append(
            {
                "layout": name,
                "processes": len(ours),
                "engines": engines(LAYOUTS[name]),
                "step_s": {who: statistics.median(windows) for who, windows in seconds.items()},
                "ours_over": {
                    who: statistics.median(a / b for a, b in zip(seconds["ours"], windows, strict=False))
                    for who, windows in seconds.items()
                },
                "expected": [stages[rank // per_stage] for rank in range(len(ours))],
                "ours": ours,
                "peak": {
                    kind: statistics.median(max(rank["peak"] for rank in run) for run in runs[kind])
                    for kind in kinds
                },
            }
        )
        print(tables(found[-1:]), file=sys.stderr, flush=True)
    return found


def tables(found: list[dict[str, Any]]) -> str:
    """Two tables as Markdown: time, and what the rank that holds most holds."""
    lines = [
        "| layout | processes | steps/s | bare engine | our time / its | / FSDP2's | / one process's |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found:
        over, engine = row["ours_over"], row["engines"][0]
        beside = f"{over['FSDP2']:.3f}" if "FSDP2" in over else ""
        lines.append(
            f"| {row['layout']} | {row['processes']} | {1 / row['step_s']['ours']:.2f} | {engine} | "
            f"{over[engine]:.3f} | {beside} | {over['one process']:.3f} |"
        )
    lines += [
        "",
        "| layout | weights, MB: expected / measured | gradients | states | peak, MB | bare engine's peak |",
        "|---|---|---|---|---|---|",
    ]
    for row in found:
        most = max(range(len(row["ours"])), key=lambda rank: row["expected"][rank])
        mine, want = row["ours"][most], row["expected"][most]
        native = "deepspeed" not in row["layout"]  # which updates copies of its own
        figures = " | ".join(
            f"{factor * want / 1e6:.1f} / {mine[kind] / 1e6:.1f}" if native else ""
            for kind, factor in (("weights", 1), ("gradients", 1), ("states", 2))
        )
        peaks = " | ".join(f"{row['peak'][kind] / 1e6:.0f}" for kind in ("ours", "engine"))
        lines.append(f"| {row['layout']} | {figures} | {peaks} |")
    return "\n".join(lines)


def unexpected(found: list[dict[str, Any]]) -> list[str]:
    """Ranks that hold something else than expected."""
    return [
        f"{row['layout']}, rank {rank}: {kind} {mine[kind]} bytes, expected {factor * want}"
        for row in found
        if "deepspeed" not in row["layout"]
        for rank, (mine, want) in enumerate(zip(row["ours"], row["expected"], strict=True))
        for kind, factor in (("weights", 1), ("gradients", 1), ("states", 2))
        if mine[kind] != factor * want
    ]


def main() -> int:
    """Parse, run, print; 1 where a rank holds something else than expected."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), metavar="LAYOUT")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--window", type=int, default=2)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each alone, for the peaks' median")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        work(json.loads(Path(args.job).read_text()))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args, Path(folder))
    print(json.dumps(found) if args.json else tables(found))
    problems = unexpected(found)
    print("\n".join(problems), file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
