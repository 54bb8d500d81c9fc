"""What ranks do in the place of a training; each takes the job's config."""

from __future__ import annotations

import gc
import json
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from layout_jobs import replicas_callback
from torch import Tensor, nn

from collie_core import AutoModelForCausalLM, CollieConfig, Trainer
from collie_core.errors import PluginError
from collie_core.layouts.gradients import GradientFlow, Mode
from collie_core.layouts.grid import Axis
from collie_core.layouts.tensor_parallel import Cutter, TensorParallel
from collie_core.plugin import ParallelPlan
from collie_core.run import whole_shards
from collie_core.shard import Shard


def own_models(config: dict[str, Any]) -> None:
    """Train a module with weights, which every rank has changed in its own way."""
    rank, out = dist.get_rank() if dist.is_initialized() else 0, Path(config["output_dir"])
    model = AutoModelForCausalLM.from_pretrained(config["model"]["path"], dtype=torch.float32)
    generator = torch.Generator().manual_seed(rank)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.01)
    out.parent.mkdir(parents=True, exist_ok=True)
    callbacks = [replicas_callback(out.with_suffix(".replicas.json"))]
    Trainer(CollieConfig(**config), model=model, callbacks=callbacks).train()


def train_again(config: dict[str, Any]) -> None:
    """Train in four folders, and write how many sockets this rank has open after each."""
    out, counts = Path(config["output_dir"]), []
    for number in range(4):
        Trainer(CollieConfig(**{**config, "output_dir": str(out / str(number))})).train()
        gc.collect()
        targets = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        counts.append(sum(target.startswith("socket:") for target in targets))
    out.with_suffix(f".{dist.get_rank()}.json").write_text(json.dumps(counts))


def count_losses(config: dict[str, Any]) -> None:
    """Train, and write how often this rank has computed the loss."""
    calls = []

    def loss_fn(logits: Tensor, labels: Tensor) -> Tensor:
        calls.append(labels.shape)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")

    Trainer(CollieConfig(**config), loss_fn=loss_fn).train()
    Path(config["output_dir"]).with_suffix(f".{dist.get_rank()}.json").write_text(json.dumps(len(calls)))


def missing_gradients(config: dict[str, Any]) -> None:
    """Two ranks with gradients of different parameters; a rank's gradient is its number and one, all over."""
    rank = dist.get_rank()
    uses = {
        "embed.a": (0, 1),
        "blocks.0.a": (0, 1),
        "blocks.0.b": (0,),
        "blocks.0.c": (),
        "blocks.1.a": (),
        "blocks.2.a": (1,),
        "head.a": (0, 1),
    }
    everyone = dist.group.WORLD
    assert everyone is not None
    found: dict[str, Any] = {}
    modes: tuple[Mode, ...] = ("keep", "update")
    for mode in modes:
        parameters = {name: nn.Parameter(torch.zeros(2, 3)) for name in uses}
        shards = {
            name: Shard(name, p, (2, 3), (0, 0), sums=(everyone,), copies=2) for name, p in parameters.items()
        }
        used: dict[str, list[float]] = {}
        flow = GradientFlow(parameters, shards, Axis(2, rank, everyone))
        flow.arm(mode, torch.tensor(True), SimpleNamespace(update=partial(_note, used)))
        loss = sum(parameters[name].sum() * (rank + 1.0) for name, ranks in uses.items() if rank in ranks)
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        flow.flush()
        for name, parameter, gradient in flow.kept():
            _note(used, name, parameter, gradient, torch.tensor(True))
        found[mode] = {"gradients": used, "norm": float(flow.norm())}
    Path(config["output_dir"]).with_suffix(f".{rank}.json").write_text(json.dumps(found))


def _note(
    used: dict[str, list[float]], name: str, parameter: nn.Parameter, gradient: Tensor, finite: Tensor
) -> None:
    used[name] = gradient.flatten().tolist()


class Scaled(nn.Linear):
    """A linear whose forward pass is more than a linear's."""

    def forward(self, input: Tensor) -> Tensor:
        return 2.0 * super().forward(input)


def cut_embeddings(config: dict[str, Any]) -> None:
    """Gradients of a cut embedding with padding, beside the whole one's, and what is not cut at all."""
    rank, everyone = dist.get_rank(), dist.group.WORLD
    assert everyone is not None
    grid: Any = None  # asked for nothing here
    tp = TensorParallel(Axis(2, rank, everyone), sequence_parallel=False)
    plan = ParallelPlan(embedding=("embed.*",))
    torch.manual_seed(0)
    whole = nn.Embedding(7, 3, padding_idx=5)
    with torch.no_grad():
        whole.weight.normal_()  # the vector of the padding too
    model: Any = nn.Module()
    model.embed = nn.Embedding(7, 3, padding_idx=5, device="meta")
    shards = whole_shards(model)
    Cutter(plan, tp, grid, shards).cut(model)
    [start, _] = shards["embed.weight"].offsets
    rows = slice(start, start + len(model.embed.weight))
    model.embed.weight = nn.Parameter(whole.weight[rows].detach().clone())
    ids = torch.tensor([[0, 5, 6, 2], [5, 3, 4, 6]])
    found = [model.embed(ids), whole(ids)]
    for out in found:
        out.square().sum().backward()
    assert torch.equal(*found)
    assert whole.weight.grad is not None
    assert torch.equal(model.embed.weight.grad, whole.weight.grad[rows])
    refused = []
    for module in (nn.Embedding(7, 3, max_norm=1.0), Scaled(3, 7)):
        model.embed = module
        try:
            Cutter(plan, tp, grid, whole_shards(model)).cut(model)
        except PluginError as error:
            refused.append(str(error))
    Path(config["output_dir"]).with_suffix(f".{rank}.json").write_text(json.dumps(refused))
