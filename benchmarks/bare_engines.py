"""The bare engines that `parallel.py` measures beside ours: a loop over the same module under each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from llama import SHAPES
from torch import Tensor, nn

from collie_core import AutoModelForCausalLM
from collie_core.layouts.partition import partition
from collie_core.ops import Context

SHAPE = SHAPES["small"]
LR = 1e-4
Step = Callable[[], Any]


def rows(job: Mapping[str, Any]) -> Tensor:
    """The rows of every step, int64 (batch, length)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, SHAPE["vocab_size"], (job["batch"], job["length"]), generator=generator)


def engines(changes: Mapping[str, Any]) -> list[str]:
    """The bare engines that a layout is measured beside, its own first."""
    if changes.get("layout", {}).get("name") == "deepspeed":
        return ["DeepSpeed"]
    if "pp_size" in changes:
        return ["torch's pipeline", "FSDP2"]
    if "tp_size" in changes:
        return ["torch's TP", "FSDP2"]
    return ["FSDP2" if changes["layout"]["zero_stage"] else "DDP"]


def bare_step(job: Mapping[str, Any], engine: str | None) -> Step:
    """A loop's step over the same module with AdamW: under an engine, or on this process alone."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).train()
    whole, changes = rows(job), job["changes"]
    if engine is None:
        return _plain_step(model, whole)
    batch = whole.chunk(dist.get_world_size())[dist.get_rank()]
    match engine:
        case "DeepSpeed":
            return deepspeed_step(model, batch, changes["layout"]["zero_stage"])
        case "torch's pipeline":
            return torch_pipeline_step(model, whole, changes)
        case "torch's TP":
            sequence = changes.get("layout", {}).get("sequence_parallel", True)
            return _plain_step(model, torch_tensor_parallel(model, whole, changes["tp_size"], sequence))
        case "DDP":
            return _plain_step(nn.parallel.DistributedDataParallel(model), batch)
    shard(model, model.blocks.values(), changes)
    return _plain_step(model, batch)


def shard(module: Any, blocks: Any, changes: Mapping[str, Any], mesh: Any = None) -> None:
    """FSDP2 over blocks and the rest; what is gathered stays so at ZeRO 1 and 2."""
    from torch.distributed.fsdp import fully_shard

    stays = changes.get("layout", {}).get("zero_stage") in (1, 2)
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=not stays)
    fully_shard(module, mesh=mesh, reshard_after_forward=False)


def _plain_step(model: Any, batch: Tensor) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)

    def step() -> Tensor:
        loss: Tensor = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


# ---------------------------------------------------------------- torch's pipeline
def stretches(changes: Mapping[str, Any], model: Any) -> list[range]:
    """The blocks of each stretch of a pipeline, in the model's order."""
    options = changes.get("layout", {})
    count = changes.get("pp_size", 1) * (2 if options.get("pp_schedule") == "interleaved" else 1)
    *sizes, embed, head = (
        sum(parameter.numel() for parameter in part.parameters())
        for part in (*model.blocks.values(), model.embed, model.head)
    )
    return partition(options.get("pp_partition", "parameters"), sizes, embed, head, count)


class Part(nn.Module):
    """A stretch of the model; ids or hidden states in, hidden states or logits out."""

    def __init__(self, model: Any, blocks: range, first: bool, last: bool) -> None:
        super().__init__()
        self.embed = model.embed if first else None
        self.blocks = nn.ModuleList(model.blocks[str(index)] for index in blocks)
        self.head = model.head if last else None

    def forward(self, h: Tensor) -> Tensor:
        """(rows, length[, hidden]) -> (rows, length, hidden or vocabulary)."""
        ids = h if self.embed is not None else h.new_zeros(h.shape[:2], dtype=torch.int64)
        ctx = Context.build(ids)
        if self.embed is not None:
            h = self.embed(h, ctx)
        for block in self.blocks:
            h = block(h, ctx)
        return h if self.head is None else self.head(h, ctx)


def torch_pipeline_step(model: Any, batch: Tensor, changes: Mapping[str, Any]) -> Step:
    """A step of torch's schedule over the stages and micro-batches that ours has, and FSDP2 over what dp is
    left."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.pipelining import PipelineStage, schedules

    pp, schedule = changes["pp_size"], changes.get("layout", {}).get("pp_schedule", "1f1b")
    mesh = init_device_mesh("cpu", (pp, dist.get_world_size() // pp), mesh_dim_names=("pp", "dp"))
    rank, dp = mesh["pp"].get_local_rank(), mesh["dp"].size()
    batch = batch.chunk(dp)[mesh["dp"].get_local_rank()]
    cuts = stretches(changes, model)
    parts = {
        number: Part(model, cuts[number], number == 0, number == len(cuts) - 1)
        for number in range(rank, len(cuts), pp)
    }
    if dp > 1:
        for part in parts.values():
            shard(part, part.blocks, changes, mesh["dp"])
    device, group = torch.device("cpu"), mesh["pp"].get_group()
    stages = [PipelineStage(part, number, len(cuts), device, group=group) for number, part in parts.items()]

    def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    kind: Any = {
        "1f1b": schedules.Schedule1F1B,
        "gpipe": schedules.ScheduleGPipe,
        "interleaved": schedules.ScheduleInterleaved1F1B,
    }[schedule]
    runner = kind(stages if schedule == "interleaved" else stages[0], pp, loss_fn=loss_of)
    optimizer = torch.optim.AdamW([p for part in parts.values() for p in part.parameters()], lr=LR)
    given = (batch,) if 0 in parts else ()
    target = batch if len(cuts) - 1 in parts else None

    def step() -> Tensor | None:
        losses: list[Tensor] = []
        runner.step(*given, target=target, losses=losses if target is not None else None)
        optimizer.step()
        optimizer.zero_grad()
        return torch.stack(losses).mean().detach() if losses else None

    return step


# ---------------------------------------------------------------- others
def torch_tensor_parallel(model: Any, batch: Tensor, tp: int, sequence: bool) -> Tensor:
    """Cut a LLaMA by DTensor plans, and by FSDP2 what dp is left; this rank's rows."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    dp = dist.get_world_size() // tp
    mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
    outside = Shard(1) if sequence else Replicate()
    columns, rows_ = ColwiseParallel(), RowwiseParallel(output_layouts=outside)
    plan: dict[str, Any] = {
        **{f"blocks.*.attention.{name}_proj": columns for name in "qkv"},
        "blocks.*.attention.o_proj": rows_,
        "blocks.*.mlp.gate_proj": columns,
        "blocks.*.mlp.up_proj": columns,
        "blocks.*.mlp.down_proj": rows_,
        "embed.tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=outside),
        "head.lm_head": ColwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()),
    }
    if sequence:
        whole = (Replicate(),)
        plan |= {
            "blocks.*.attention_norm": SequenceParallel(),
            "blocks.*.mlp_norm": SequenceParallel(),
            "blocks.*.attention": PrepareModuleInput(
                input_layouts=(Shard(1), None), desired_input_layouts=(Replicate(), None)
            ),
            "blocks.*.mlp": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=whole),
            "head.norm": SequenceParallel(),
        }
    parallelize_module(model, mesh["tp"], plan)
    if dp > 1:
        shard(model, model.blocks.values(), {}, mesh["dp"])
    return batch.chunk(dp)[dist.get_rank() // tp]


def deepspeed_step(model: Any, batch: Tensor, stage: int) -> Step:
    """A step of DeepSpeed's engine, in fp32 and without clipping as ours."""
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": len(batch),
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "steps_per_print": None,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=settings, dist_init_required=False
    )

    def step() -> None:
        engine.backward(engine(batch, labels=batch).loss)
        engine.step()

    return step
