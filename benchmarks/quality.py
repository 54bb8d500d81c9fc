"""What each method makes of the same fine-tuning, at its default rate and beside it: accuracy and memory.

A small LLaMA learns plain statements about numbers and words, and is then tuned on questions as a user would
do it, by `Trainer(config)`: once for each method and rate, on the same records in the same order.  A default
rate is marked where a neighbour, or AdamW at its own, is clearly better.  Status 1 where one is bad.

    python benchmarks/quality.py                               # CUDA: size small, bf16; CPU: size tiny, fp32
    python benchmarks/quality.py --methods adamw,lomo --output quality.json
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import platform
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from quality_task import EPOCHS, KINDS, SIZES, Size, documents, held_out, tuning, write_model

from collie_core import AutoModelForCausalLM, AutoTokenizer, CollieConfig, Trainer
from collie_core.config.schema import DataSection
from collie_core.data.build import build_dataset
from collie_core.errors import RunFailed
from collie_core.plugin import Run, hookimpl
from collie_core.registry import Registry

MARKED, BAD = 0.02, 0.1  # how much less accurate than a neighbour or AdamW


@dataclass(frozen=True)
class Method:
    """Sections of a config.

    descent: a step is in proportion to the gradient, so that its rate does not depend on the width.
    """

    optimizer: Mapping[str, Any]
    adapters: tuple[str, ...] = ()
    descent: bool = False

    @property
    def default_lr(self) -> float:
        """The rate of a run whose config names none."""
        registry = Registry()
        optimizer: Any = registry.load("optimizer", self.optimizer["name"]).cls
        clipped = "clip_grad_norm" in self.optimizer and hasattr(optimizer, "default_lr_clipped")
        lr: float = optimizer.default_lr_clipped if clipped else optimizer.default_lr
        adapters: list[Any] = [registry.load("adapter", name).cls for name in self.adapters]
        return lr * min(
            (cls.default_lr_factor for cls in adapters if hasattr(cls, "default_lr_factor")), default=1.0
        )


METHODS = {
    "adamw": Method({"name": "adamw"}),
    "sgd": Method({"name": "sgd"}, descent=True),
    "lomo": Method({"name": "lomo"}, descent=True),
    "lomo+clip": Method({"name": "lomo", "clip_grad_norm": 1.0}, descent=True),
    "adalomo": Method({"name": "adalomo"}),
    "lora": Method({"name": "adamw"}, ("lora",)),
    "qlora": Method({"name": "adamw"}, ("nf4", "lora")),
    "lion": Method({"name": "lion"}),
    "adan": Method({"name": "adan"}),
    "sophiag": Method({"name": "sophiag"}),
    "muon": Method({"name": "muon"}),
    "adafactor": Method({"name": "adafactor"}),
    "adamw8bit": Method({"name": "adamw8bit"}),
}
CUDA_ALONE = {"adamw8bit"}


@dataclass
class Result:
    """Of one tuning.  accuracy and loss (of a token) are of the held-out questions; kinds: accuracy by kind.

    peak_bytes: the most allocated on the device in the steps; None on the CPU.  problem: why it failed.
    """

    method: str
    factor: float
    lr: float
    accuracy: float = 0.0
    kinds: dict[str, float] = field(default_factory=dict)
    loss: float | None = None
    peak_bytes: int | None = None
    seconds: float = 0.0
    problem: str = ""

    @property
    def answered(self) -> str:
        """The accuracy, or why there is none."""
        return self.problem or f"{self.accuracy:.1%}"

    def __str__(self) -> str:
        parts = [f"{self.method:10} lr {self.lr:.1e}  {self.answered:>6}"]
        if self.loss is not None:
            parts.append(f"loss {self.loss:.4f}")
        if self.peak_bytes is not None:
            parts.append(f"{self.peak_bytes / 2**20:.0f} MiB")
        return "  ".join([*parts, f"{self.seconds:.1f} s", _shares(self.kinds)])


def _shares(kinds: Mapping[str, float]) -> str:
    return "  ".join(f"{kind} {share:.0%}" for kind, share in kinds.items())


class Watch:
    """A run's rate, its last loss, and its peak of memory in the steps: neither in loading nor in saving."""

    lr = 0.0
    loss = math.nan
    peak_bytes: int | None = None

    @hookimpl
    def collie_run_start(self, run: Run) -> None:
        if run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    @hookimpl
    def collie_step_end(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        self.lr, self.loss = max(self.lr, metrics["lr"]), metrics["loss"]
        if run.device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated()


class Bench:
    """The pre-trained model and the data in a folder, and what is done with them."""

    def __init__(self, folder: Path, size: Size, dtype: str, seed: int) -> None:
        self.folder, self.size, self.dtype, self.seed = folder, size, dtype, seed
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.questions = held_out(size, seed + 2)

    def prepare(self) -> float:
        """Write the data and pre-train, with AdamW; returns the last loss, NaN where all was done before."""
        size, initial = self.size, self.folder / "initial"
        write_model(initial, size, self.seed)
        tokenizer = AutoTokenizer.from_pretrained(initial)
        sources: dict[str, Any] = {
            "documents": list(documents(size, self.seed)),
            "tuning": tuning(size, self.seed + 1),
            "held_out": self.questions,
        }
        section = DataSection(max_length=size.length)
        for name, records in sources.items():  # once for all trainings
            build_dataset(records, tokenizer, section, split="train").save(self.folder / name)
        config = self._config(
            initial,
            self.folder / "pretrained",
            optimizer={"name": "adamw", "lr": size.pretraining_lr, "clip_grad_norm": 1.0},
            schedule={"name": "cosine", "warmup_ratio": 0.05, "min_ratio": 0.05},
            data={"train": str(self.folder / "documents"), "max_length": size.length},
        )
        config.train.micro_batch_size, config.train.epochs = size.pretraining_batch, EPOCHS
        watch = Watch()
        _train(config, watch)
        return watch.loss

    def tune(self, name: str, factor: float) -> Result:
        """One training from the pre-trained model, and what came of it."""
        method, out, watch = METHODS[name], self.folder / "tuned", Watch()
        lr = method.default_lr * factor * (1.0 if method.descent else self.size.rate)
        result = Result(name, factor, lr)
        config = self._config(
            self.folder / "pretrained" / "model",
            out,
            optimizer={**method.optimizer, "lr": lr},
            schedule={"name": "cosine", "warmup_ratio": 0.03},
            adapters=list(method.adapters),
            data={
                "train": str(self.folder / "tuning"),
                "eval": str(self.folder / "held_out"),
                "max_length": self.size.length,
            },
            evaluate={"micro_batch_size": 200},
        )
        shutil.rmtree(out, ignore_errors=True)  # of a killed benchmark
        gc.collect()  # models that cycles or the traceback of a failed run have kept
        started = time.perf_counter()
        try:
            figures = _train(config, watch)
            result.seconds = time.perf_counter() - started
            result.lr, result.peak_bytes = watch.lr, watch.peak_bytes
            result.loss = figures["perplexity/loss"]
            result.accuracy, result.kinds = self.answers(out)
        except RunFailed:
            result.problem = "diverged"
        except Exception as error:
            traceback.print_exc()
            result.problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        shutil.rmtree(out, ignore_errors=True)
        return result

    @torch.no_grad()
    def answers(self, folder: Path, plain: bool = False) -> tuple[float, dict[str, float]]:
        """The share of the held-out questions that a model's greedy answers are right for.

        Of all, and by kind.  plain: asked as in the plain texts, where only the beginning counts.
        """
        tokenizer = AutoTokenizer.from_pretrained(folder)
        dtype = getattr(torch, self.dtype)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(self.device)
        tokenizer.padding_side = "left"
        chats = [question["messages"][:1] for question in self.questions]
        how: dict[str, Any] = {"padding": True, "return_tensors": "pt"}
        if plain:
            prompts = tokenizer([question["plain"] for question in self.questions], **how)
        else:
            prompts = tokenizer.apply_chat_template(
                chats, add_generation_prompt=True, return_dict=True, **how
            )
        ids, mask = prompts["input_ids"], prompts["attention_mask"]
        output = model.generate(ids, mask.to(self.device), max_new_tokens=12)
        said = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
        right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
        for question, answer in zip(self.questions, said, strict=True):
            wanted, found = tokenizer.tokenize(question["messages"][1]["content"]), answer.split()
            right[question["kind"]].append(found[: len(wanted) if plain else None] == wanted)
        kinds = {kind: sum(found) / len(found) for kind, found in right.items()}
        return sum(map(sum, right.values())) / len(self.questions), kinds

    def _config(self, model: Path, out: Path, **sections: Any) -> CollieConfig:
        return CollieConfig(
            model={"path": str(model), "dtype": self.dtype},
            train={
                "micro_batch_size": self.size.batch,
                "activation_checkpointing": "none",
                "compile": False,
            },
            monitors=[],
            output_dir=str(out),
            seed=self.seed,
            **sections,
        )


def _train(config: CollieConfig, watch: Watch) -> dict[str, float]:
    """The last evaluation.  A signal that ended the run ends the benchmark."""
    result = Trainer(config, callbacks=[watch]).train()
    if result.signal is not None:
        sys.exit(128 + result.signal)
    return result.evaluation


def verdict(results: Sequence[Result], method: str) -> tuple[str, bool]:
    """What is wrong with a method's default, "" if nothing is; and whether it is bad."""
    found = {one.factor: one for one in results if one.method == method}
    default = found.get(1.0)
    if default is None:
        return "not run", False
    if default.problem:
        return default.problem, True
    best = max(found.values(), key=lambda one: one.accuracy)
    adamw = next((one for one in results if one.method == "adamw" and one.factor == 1.0), default)
    for other, words in ((best, f"better at {best.factor:.2g} `lr`"), (adamw, "below adamw")):
        behind = other.accuracy - default.accuracy
        if behind > MARKED:
            return words, behind > BAD
    return "", False


def table(results: Sequence[Result]) -> str:
    """Markdown: a row for each method."""
    factors = sorted({one.factor for one in results})
    rates = [f"at {factor:.2g} `lr`" if factor != 1.0 else "at `lr`" for factor in factors]
    head = ["method", "default `lr`", *rates, "loss", "peak MiB", ""]
    rows = [head, ["---"] * len(head)]
    for method in dict.fromkeys(one.method for one in results):
        found = {one.factor: one for one in results if one.method == method}
        default = found.get(1.0) or Result(method, 1.0, 0.0)
        loss = "" if default.loss is None else f"{default.loss:.3f}"
        accuracies = [found[factor].answered if factor in found else "" for factor in factors]
        memory = "" if default.peak_bytes is None else f"{default.peak_bytes / 2**20:.0f}"
        words, _ = verdict(results, method)
        rows.append([f"`{method}`", f"{METHODS[method].default_lr:.0e}", *accuracies, loss, memory, words])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line, or what is given in its place."""
    cuda = torch.cuda.is_available()
    usual = [name for name in METHODS if cuda or name not in CUDA_ALONE]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="small" if cuda else "tiny")
    parser.add_argument("--methods", metavar="A,B", default=",".join(usual), help=f"of {', '.join(METHODS)}")
    parser.add_argument(
        "--factors", metavar="F,F", default="1,1/3,3", help="of the default rates, in this order"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16" if cuda else "float32")
    parser.add_argument("--steps", type=int, help="of a tuning")
    parser.add_argument("--pretraining-steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--time-limit", type=float, metavar="S", help="start no tuning after so many seconds")
    parser.add_argument(
        "--folder", type=Path, help="keep the pre-trained model here, and take it if it is there"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument("--json", action="store_true", help="print them as JSON, all else on stderr")
    args = parser.parse_args(given)
    args.methods = args.methods.split(",")
    if unknown := [name for name in args.methods if name not in METHODS]:
        parser.error(f"unknown methods: {', '.join(unknown)}; known: {', '.join(METHODS)}")
    try:
        args.factors = [float(Fraction(factor)) for factor in args.factors.split(",")]
    except ValueError:
        parser.error(f"--factors: expected numbers such as 1,1/3,3, got {args.factors}")
    return args


def main(given: Sequence[str] | None = None) -> int:
    """Pre-train, tune, print; 1 where some default is bad."""
    args, started = arguments(given), time.monotonic()

    def say(text: str) -> None:
        """A line at once, whatever becomes of the rest."""
        where = sys.stderr if args.json else sys.stdout
        print(f"{time.monotonic() - started:5.0f} s  {text}", file=where, flush=True)

    given_steps = {"steps": args.steps, "pretraining_steps": args.pretraining_steps}
    size = replace(SIZES[args.size], **{key: value for key, value in given_steps.items() if value})
    with tempfile.TemporaryDirectory(prefix="collie-quality-") as scratch:
        bench = Bench(args.folder or Path(scratch), size, args.dtype, args.seed)
        found: dict[str, Any] = {
            "device": torch.cuda.get_device_name() if bench.device == "cuda" else platform.machine(),
            "torch": torch.__version__,
            "size": args.size,
            "dtype": args.dtype,
        }
        loss = bench.prepare()
        found["before"], _ = bench.answers(bench.folder / "pretrained")
        found["plain"], kinds = bench.answers(bench.folder / "pretrained", plain=True)
        say(
            f"pre-trained to a loss of {loss:.4f}; of {len(bench.questions)} held-out questions it answers "
            f"{found['before']:.1%}, in plain texts {found['plain']:.1%}  {_shares(kinds)}"
        )
        results: list[Result] = []
        for factor, name in itertools.product(args.factors, args.methods):
            if args.time_limit and time.monotonic() - started > args.time_limit:
                say(f"time limit: {name} at {factor:.2g} of its rate is left out")
                continue
            results.append(bench.tune(name, factor))
            say(str(results[-1]))
            found["results"] = [asdict(result) for result in results]
            found["verdicts"] = {method: verdict(results, method)[0] for method in args.methods}
            if args.output:
                args.output.write_text(json.dumps(found, indent=1) + "\n")
    if args.json:
        print(json.dumps(found))
    else:
        print(f"\n{found['device']}, torch {torch.__version__}, size {args.size}, {args.dtype}\n")
        print(table(results))
    return int(any(verdict(results, method)[1] for method in args.methods))


if __name__ == "__main__":
    sys.exit(main())
