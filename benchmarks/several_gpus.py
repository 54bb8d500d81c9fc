"""LLaMA shapes over the GPUs of one host: each layout beside bare FSDP2 on the same module, in one run.

Every layout is a job of its own, a process a GPU (nccl).  In it our run, `Trainer(config).train()` with data
reader, metrics and checks, and a bare FSDP2 loop over as many processes take turns in windows of a few steps;
both compile each block and see the same rows.  Printed are tokens a second and GPU, MFU (6 N + 6 layers
hidden length flop a token, N without the input embedding), the peak of allocated memory of a GPU, and our
time over that of FSDP2, window by window.  A pipeline cuts each pass into twice as many micro-batches as it
has stages.

    python benchmarks/several_gpus.py --shape 7b --layouts "zero 2" "zero 3" tp2 pp2
    python benchmarks/several_gpus.py --shape 65b --layouts "zero 3" --optimizers lomo adamw8bit --alone \
        --recompute full

Weights are random; they are written to --scratch and read by every rank as a user's would be.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from llama import SHAPES, Ids, flop_per_token, hf_config, mfu, run_job
from torch import Tensor

from collie_core import CollieConfig, Trainer
from collie_core.models.auto import build_model
from collie_core.models.provider import select_provider
from collie_core.plugin import Run, hookimpl
from collie_core.safetensors_writer import SafetensorsWriter

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"name": "adamw", "lr": 1e-5, "state_dtype": "bfloat16"},
    "adamw8bit": {"name": "adamw8bit", "lr": 1e-5, "in_backward": True},
    "lomo": {"name": "lomo", "lr": 1e-3},
}
Step = Callable[[], Any]


def layouts(processes: int) -> dict[str, dict[str, Any]]:
    """Layouts of so many processes, by name."""
    found: dict[str, dict[str, Any]] = {
        f"zero {stage}": {"dp_size": processes, "layout": {"zero_stage": stage}} for stage in range(4)
    }
    for name in ("tp", "pp"):
        for size in (2, 4, 8):
            if processes % size == 0:
                dp = processes // size
                stage = {"layout": {"zero_stage": 2 if name == "pp" else 3}} if dp > 1 else {}
                found[f"{name}{size}"] = {"dp_size": dp, f"{name}_size": size, **stage}
    return found


def tensors(shape: Mapping[str, int]) -> Iterator[tuple[str, dict[str, tuple[int, ...]]]]:
    """(part, Hugging Face name -> sizes) of a LLaMA."""
    hidden, inner, layers, _, words = shape.values()
    yield "embed", {"model.embed_tokens.weight": (words, hidden)}
    for index in range(layers):
        sizes: dict[str, tuple[int, ...]] = {
            f"self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"
        }
        sizes |= {f"mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        sizes |= {"mlp.down_proj.weight": (hidden, inner)}
        sizes |= {f"{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        yield f"block-{index}", {f"model.layers.{index}.{name}": size for name, size in sizes.items()}
    yield "head", {"model.norm.weight": (hidden,), "lm_head.weight": (words, hidden)}


def write_model(folder: Path, shape: Mapping[str, int], device: str) -> None:
    """A checkpoint of random weights; all blocks have the same values, made once, in a file each."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    made: dict[str, Tensor] = {}
    where = {}
    contents: dict[str, dict[str, Tensor]] = {}
    for part, sizes in tensors(shape):
        content = contents[f"{part}.safetensors"] = {}
        for name, size in sizes.items():
            key = name.split(".", 3)[-1] if part.startswith("block") else name
            if key not in made:
                values = torch.ones(size) if len(size) == 1 else 0.02 * torch.randn(size, device=device)
                made[key] = values.to("cpu", torch.bfloat16)
            content[name] = made[key]
            where[name] = f"{part}.safetensors"

    def write(file: str) -> None:
        specs = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in contents[file].items()}
        with SafetensorsWriter(folder / file, specs, digest=False) as writer:
            for name in writer.names:
                writer.write(name, contents[file][name])

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, contents))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text(json.dumps(hf_config(shape, 32768)))


# ---------------------------------------------------------------- in a process of a job
def rows(job: Mapping[str, Any]) -> Tensor:
    """The rows of every step, int64 (batch, length)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, job["words"], (job["batch"], job["length"]), generator=generator)


def fsdp2_step(job: Mapping[str, Any], device: torch.device) -> Step:
    """A bare FSDP2 loop over all processes on the same module, with AdamW whose states are bf16, or SGD."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)  # as ours
    model: Any = build_model(select_provider(job["model"])).to(torch.bfloat16).train()
    stage = job["changes"].get("layout", {}).get("zero_stage")
    for key, block in list(model.blocks.items()):
        if device.type == "cuda":
            block.compile()
        if job["recompute"] == "full":
            block = model.blocks[key] = checkpoint_wrapper(block)
        fully_shard(block, reshard_after_forward=stage not in (1, 2), mp_policy=policy)
    fully_shard(model, reshard_after_forward=False, mp_policy=policy)
    model.to_empty(device=device)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.to_local(), std=0.02)
    kind = torch.optim.SGD if job["optimizer"] == "lomo" else partial(torch.optim.AdamW, fused=True)
    optimizer: Any = kind(model.parameters(), lr=1e-5)
    own = rows(job).to(device).chunk(dist.get_world_size())[dist.get_rank()]
    passes = own.chunk(job["accumulation"])

    def step() -> None:
        for number, batch in enumerate(passes, 1):
            if stage in (1, 2):  # whole gradients add up; under zero 3 each is summed and cut at once
                model.set_requires_gradient_sync(number == len(passes))
                model.set_reshard_after_backward(number == len(passes))
            model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


class Turns:
    """After each window of our run's steps FSDP2 does as many; every window is timed."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        self.job = job
        self.seconds: dict[str, list[float]] = {"ours": [], "fsdp2": []}
        self.peaks: dict[str, int] = {"ours": 0, "fsdp2": 0}
        self.start_up = 0.0
        self.step: Step | None = None
        self.begin = time.perf_counter()

    @hookimpl
    def collie_step_end(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        window, first = self.job["window"], self.job["warmup"]
        if step == 1:
            self._meet(run)
            self.start_up = time.perf_counter() - self.begin
            reset_peak(run.device)
        if step == first:
            self._meet(run)
            self.peaks["ours"] = peak(run.device)
            if not self.job["alone"]:
                before = allocated(run.device)
                self.step = fsdp2_step(self.job, run.device)
                self._bare(run, first)
                reset_peak(run.device)
                self._bare(run, 1)
                self.peaks["fsdp2"] = peak(run.device) - before
                self.seconds["fsdp2"].clear()
        elif step > first and (step - first) % window == 0:
            self._meet(run)
            self.seconds["ours"].append((time.perf_counter() - self.begin) / window)
            self._bare(run, window)
        else:
            return
        self._meet(run)
        self.begin = time.perf_counter()

    def _bare(self, run: Run, steps: int) -> None:
        if self.step is None:
            return
        self._meet(run)
        begin = time.perf_counter()
        for _ in range(steps):
            self.step()
        self._meet(run)
        self.seconds["fsdp2"].append((time.perf_counter() - begin) / steps)

    def _meet(self, run: Run) -> None:
        if run.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()


def reset_peak(device: torch.device) -> None:
    """Count the peak of allocated memory from now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int:
    """The peak since then, in bytes; 0 on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def allocated(device: torch.device) -> int:
    """Allocated bytes; 0 on the CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def work(job: Mapping[str, Any]) -> None:
    """What a process of a job does; its findings go into a file for each rank."""
    dp = job["changes"].get("dp_size", 1)
    pp = job["changes"].get("pp_size", 1)
    pieces = job["accumulation"] * (2 * pp if pp > 1 else 1)
    config = CollieConfig(
        model={"path": job["model"], "dtype": "bfloat16"},
        optimizer=OPTIMIZERS[job["optimizer"]],
        schedule="constant",
        data={"max_length": job["length"]},
        train={
            "micro_batch_size": job["batch"] // dp // pieces,
            "gradient_accumulation_steps": pieces,
            "epochs": job["warmup"] + job["window"] * job["windows"],
            "activation_checkpointing": job["recompute"],
        },
        monitors=["console"],
        output_dir=str(Path(job["folder"]) / "run"),
        **job["changes"],
    )
    records = [{"tokens": row, "labels": row} for row in rows(job).tolist()]
    turns = Turns(job)
    tokenizer: Any = Ids(job["words"])

    class NoResult:
        """Ends the run when the windows are measured: its weights are of no use."""

        @hookimpl
        def collie_checkpoint_saving(self, run: Run, step: int) -> None:
            found = {"seconds": turns.seconds, "peaks": turns.peaks, "start_up": turns.start_up}
            (Path(job["folder"]) / f"rank-{run.rank}.json").write_text(json.dumps(found))
            dist.barrier()
            os._exit(0)

    Trainer(config, train_dataset=records, tokenizer=tokenizer, callbacks=[turns, NoResult()]).train()


# ---------------------------------------------------------------- the jobs
def measure(
    args: argparse.Namespace, processes: int, name: str, optimizer: str, model: Path
) -> dict[str, Any]:
    """Run the job of one layout; its row."""
    shape = SHAPES[args.shape]
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        job = {
            "changes": layouts(processes)[name],
            "model": str(model),
            "folder": folder,
            "words": shape["vocab_size"],
            "batch": args.batch * args.accumulation * processes,
            "optimizer": optimizer,
            **{
                key: getattr(args, key)
                for key in ("length", "warmup", "window", "windows", "alone", "recompute", "accumulation")
            },
        }
        status = run_job(__file__, job, Path(folder) / "job.json", processes)
        found = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("rank-*.json"))]
    row: dict[str, Any] = {"layout": name, "optimizer": optimizer, "gpus": processes}
    if status or len(found) < processes:
        return {**row, "problem": f"the job ended with status {status}"}
    flop = flop_per_token(shape, args.length)
    seconds = found[0]["seconds"]
    for who, windows in seconds.items():
        if windows:
            step = statistics.median(windows)
            tokens = args.batch * args.accumulation * args.length / step  # of one GPU
            row[who] = {
                "step_s": step,
                "tok_s_gpu": tokens,
                "mfu": mfu(tokens, flop) or math.nan,
                "peak_gib": max(rank["peaks"][who] for rank in found) / 2**30,
            }
    ratios = [mine / bare for mine, bare in zip(seconds["ours"], seconds["fsdp2"], strict=False)]
    return {
        **row,
        "start_up_s": found[0]["start_up"],
        "ours_over_fsdp2": statistics.median(ratios or [math.nan]),
    }


def line(row: Mapping[str, Any]) -> str:
    """A row of the table, as Markdown."""
    cells = [row["layout"], row["optimizer"], str(row["gpus"])]
    if "problem" in row:
        return f"| {' | '.join(cells)} | {row['problem']} |"
    for who in ("ours", "fsdp2"):
        found = row.get(who)
        cells += (
            [f"{found['tok_s_gpu']:,.0f}", f"{found['mfu']:.3f}", f"{found['peak_gib']:.1f}"]
            if found
            else [""] * 3
        )
    cells += [f"{row['ours_over_fsdp2']:.3f}", f"{row['start_up_s']:.0f}"]
    return f"| {' | '.join(cells)} |"


COLUMNS = [
    *("layout", "optimizer", "GPUs", "tok/s a GPU", "MFU", "peak GiB"),
    *("FSDP2: tok/s a GPU", "MFU", "peak GiB", "our time / FSDP2's", "first step, s"),
]
HEADER = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


def main() -> int:
    """Parse, run, print each row when it is there; 1 where a job failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--layouts", nargs="+", default=["zero 2", "zero 3", "tp2", "pp2"], metavar="LAYOUT")
    parser.add_argument("--processes", type=int, default=torch.cuda.device_count())
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=["adamw"])
    parser.add_argument("--batch", type=int, default=2, help="rows a GPU and pass")
    parser.add_argument("--accumulation", type=int, default=1, help="passes of a step")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--recompute", choices=["none", "full"], default="none")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--window", type=int, default=3)
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--alone", action="store_true", help="without FSDP2 beside it")
    parser.add_argument("--scratch", default="/dev/shm", help="where weights are written")
    parser.add_argument("--output", type=Path, help="a JSON file for the rows")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        work(json.loads(Path(args.job).read_text()))
        return 0
    known = layouts(args.processes)
    unknown = [name for name in args.layouts if name not in known]
    if args.processes < 2 or unknown:
        parser.error(
            f"{args.processes} processes: {', '.join(unknown) or 'two are needed'}; known: {', '.join(known)}"
        )
    folder = Path(tempfile.mkdtemp(dir=args.scratch))
    try:
        write_model(folder / "model", SHAPES[args.shape], "cuda" if torch.cuda.is_available() else "cpu")
        print(HEADER, flush=True)
        found = []
        for name, optimizer in product(args.layouts, args.optimizers):
            found.append(measure(args, args.processes, name, optimizer, folder / "model"))
            print(line(found[-1]), flush=True)
            if args.output:
                args.output.write_text(json.dumps(found))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if any("problem" in row for row in found) else 0


if __name__ == "__main__":
    sys.exit(main())
