"""The bare engines that `parallel.py` measures beside ours: a loop over the same module under each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from llama import SHAPES
from torch import Tensor

from collie_core import AutoModelForCausalLM

SHAPE = SHAPES["small"]
LR = 1e-4
Step = Callable[[], Any]


def rows(job: Mapping[str, Any]) -> Tensor:
    """The rows of every step, int64 (batch, length)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, SHAPE["vocab_size"], (job["batch"], job["length"]), generator=generator)


def bare_step(job: Mapping[str, Any], alone: bool) -> Step:
    """A loop's step over the same module with AdamW: on this process alone, or under the bare engine."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).train()
    batch = rows(job)
    if not alone:
        batch = batch.chunk(dist.get_world_size())[dist.get_rank()]
        layout = job["changes"].get("layout", {})
        stage = layout.get("zero_stage")
        if layout.get("name") == "deepspeed":
            return deepspeed_step(model, batch, stage)
        tp = job["changes"].get("tp_size", 1)
        if tp > 1:
            sequence = layout.get("sequence_parallel", True)
            batch = torch_tensor_parallel(model, rows(job), tp, sequence)
        elif job["changes"].get("dp_size") == 2 and stage == 0:
            model = DistributedDataParallel(model)
        else:
            for block in model.blocks.values():
                fully_shard(block, reshard_after_forward=stage not in (1, 2))
            fully_shard(model, reshard_after_forward=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)

    def step() -> Tensor:
        loss: Tensor = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def torch_tensor_parallel(model: Any, batch: Tensor, tp: int, sequence: bool) -> Tensor:
    """Cut a LLaMA by DTensor plans, and by FSDP2 what dp is left; this rank's rows."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
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
        for block in model.blocks.values():
            fully_shard(block, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"], reshard_after_forward=False)
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
