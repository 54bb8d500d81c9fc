"""One contestant of `h200.py` in this process: three timed windows of steps, and the memory they took."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import h200_peers
import torch
from h200_rows import MEAN_LENGTH, Ours, Peer, Row
from llama import PEAK_FLOPS, SHAPES, Ids, hf_config
from torch import Tensor, nn

from collie_core import CollieConfig, Trainer
from collie_core.files import json_text
from collie_core.models.auto import build_model
from collie_core.models.buffers import reset_buffers
from collie_core.models.loading import Slots
from collie_core.models.provider import provider_for
from collie_core.ops import select_ops
from collie_core.plugin import Run, hookimpl

WARMUP, WINDOWS = 3, 3
PADDED_RECORDS = 16  # of mixed lengths in a peer's batch: with the padding about as many tokens as ours
DISTINCT_STEPS = 8  # so many batches take turns


class Enough(BaseException):
    """All windows are measured: nothing is saved or exported.  No Exception, which a run would report."""


class Windows:
    """Steps counted into windows of at least `seconds`, after those that compile and warm up."""

    def __init__(self, seconds: float, cuda: bool) -> None:
        self.seconds, self.cuda = seconds, cuda
        self.steps = self.tokens = 0
        self.begin = 0.0
        self.speeds: list[float] = []
        self.all_peak = 0

    def step(self, tokens: int) -> None:
        """A step is done.  Raises Enough after the last of the last window."""
        self.steps += 1
        if self.steps < WARMUP:
            return
        if self.steps == WARMUP:
            return self._start()
        self.tokens += tokens
        if time.perf_counter() - self.begin < self.seconds:
            return
        if self.cuda:
            torch.cuda.synchronize()
        self.speeds.append(self.tokens / (time.perf_counter() - self.begin))
        if len(self.speeds) == WINDOWS:
            raise Enough
        self._start(reset=False)

    def _start(self, reset: bool = True) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            if reset:
                self.all_peak = torch.cuda.max_memory_allocated()
                torch.cuda.reset_peak_memory_stats()
        self.tokens, self.begin = 0, time.perf_counter()

    def result(self, row: Row) -> dict[str, Any]:
        """Figures of the windows; memory is that of the steps after the first ones, and of the whole run."""
        speed = statistics.median(self.speeds)
        found: dict[str, Any] = {"tok_s": speed, "windows": self.speeds, "mfu": None}
        if self.cuda:
            peak = torch.cuda.max_memory_allocated()
            found |= {
                "mfu": speed * row.flop_per_token() / PEAK_FLOPS,
                "peak_gib": peak / 2**30,
                "peak_gib_from_start": max(peak, self.all_peak) / 2**30,
                "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
            }
        return found


class Watch:
    """Our run's steps, and what it resolved."""

    def __init__(self, windows: Windows) -> None:
        self.windows = windows
        self.resolved: dict[str, Any] = {}

    @hookimpl
    def collie_step_end(self, run: Run, metrics: Mapping[str, float]) -> None:
        self.resolved = dict(run.resolved)
        self.windows.step(int(metrics["tokens"]))


def random_model(config: dict[str, Any], dtype: torch.dtype, device: str) -> nn.Module:
    """Our module as the Trainer builds it of a folder, but filled at random where it runs."""
    model = build_model(provider_for(config, None), select_ops(use_flash="auto", device=device))
    slots = Slots(model)
    for name, tensor in list(slots.tensors.items()):
        values = slots.allocate(name, device, dtype)
        values.normal_(0.0, 0.02) if tensor.ndim > 1 else values.fill_(1.0)
    reset_buffers(model, torch.device(device))
    return model


def lengths_of(row: Row) -> list[int]:
    """Of the records of all steps: `batch` full rows each, or some of 16 to 2,048 tokens of mean 400."""
    if not row.packed:
        return [row.length] * row.batch * DISTINCT_STEPS
    generator = torch.Generator().manual_seed(1)
    count = row.batch * row.length * DISTINCT_STEPS // MEAN_LENGTH
    drawn = -torch.log(torch.rand(count, generator=generator)) * MEAN_LENGTH  # exponential
    return [int(length) for length in drawn.clamp(16, row.length)]


def records_of(row: Row) -> list[list[int]]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(0)
    size = SHAPES[row.shape]["vocab_size"]
    return [torch.randint(3, size, (n,), generator=generator).tolist() for n in lengths_of(row)]


def run_ours(row: Row, ours: Ours, device: str, windows: Windows) -> dict[str, Any]:
    """Through the Trainer, as a config runs it."""
    config, cuda = hf_config(SHAPES[row.shape], max(2048, row.length)), device == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    records = [{"tokens": tokens, "labels": tokens} for tokens in records_of(row)]
    watch = Watch(windows)
    sections = {**row.sections, **ours.sections}
    if not cuda and "plugins" in sections:
        sections["plugins"] = [{**plugin, "emulate": True} for plugin in sections["plugins"]]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "config.json").write_text(json_text(config), encoding="utf-8")
        run_config = CollieConfig(
            **sections,
            model={"path": str(folder), "dtype": str(dtype).removeprefix("torch.")},
            schedule="constant",
            data={"max_length": row.length, "packing": row.packed},
            train={
                "micro_batch_size": row.batch,
                "epochs": 10_000,
                "activation_checkpointing": ours.recompute,
            },
            output_dir=str(folder / "run"),
        )
        trainer = Trainer(
            run_config,
            model=random_model(config, dtype, device),
            tokenizer=Ids(config["vocab_size"]),
            train_dataset=records,
            callbacks=[watch],
        )
        try:
            trainer.train()
        except Enough:
            return {"resolved": watch.resolved}
    raise RuntimeError("the run ended before all windows were measured")


def run_peer(row: Row, peer: Peer, device: str, windows: Windows) -> dict[str, Any]:
    """A bare loop over batches that are on the device already; records of mixed lengths are padded."""
    needed = "liger_kernel" if peer.liger else h200_peers.NEEDS.get(peer.method)
    if needed is not None and find_spec(needed) is None:
        return {"skipped": f"{needed} is not installed"}
    if needed == "unsloth":
        import_module(needed)  # it changes transformers, which must not be in use yet
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    config = hf_config(SHAPES[row.shape], max(2048, row.length))
    model = h200_peers.stock_model(config, dtype, device, peer.liger)
    step = h200_peers.METHODS[peer.method](model, 1e-4)
    batches = batches_of(row, records_of(row), device)
    try:
        while True:
            for tokens, batch in batches:
                step(batch)
                windows.step(tokens)
    except Enough:
        return {}


def batches_of(
    row: Row, records: Sequence[Sequence[int]], device: str
) -> list[tuple[int, dict[str, Tensor]]]:
    """(tokens without padding, what the model is given)."""
    made, size = [], PADDED_RECORDS if row.packed else row.batch
    for first in range(0, len(records) - size + 1, size):
        group = [torch.tensor(tokens) for tokens in records[first : first + size]]
        pad = nn.utils.rnn.pad_sequence
        batch = {
            "input_ids": pad(group, batch_first=True, padding_value=0),
            "labels": pad(group, batch_first=True, padding_value=-100),
        }
        if row.packed:
            batch["attention_mask"] = pad([torch.ones_like(tokens) for tokens in group], batch_first=True)
        made.append((sum(map(len, group)), {key: value.to(device) for key, value in batch.items()}))
    return made


def measure(row: Row, contestant: Ours | Peer, device: str, seconds: float) -> dict[str, Any]:
    """Its figures, or `skipped` or `error` with the reason."""
    windows = Windows(seconds, device == "cuda")
    try:
        if isinstance(contestant, Ours):
            found = run_ours(row, contestant, device, windows)
        else:
            found = run_peer(row, contestant, device, windows)
    except Exception as error:  # one contestant's failure is a result; the others go on
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"}
    return found if "skipped" in found else {**windows.result(row), **found}
