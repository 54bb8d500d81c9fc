"""Generation under a layout: each rank runs its stages, and all ranks choose the same tokens."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from collie_core.models.generation import GenerationOptions, generate_with

if TYPE_CHECKING:
    from collie_core.layouts.native import NativeLayout
    from collie_core.ops import Context, KVCache


def generate(
    layout: NativeLayout, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
) -> Tensor:
    """Prompts and continuations, (B, S + new), the same on all ranks; options as of `GenerationOptions`."""
    chosen = GenerationOptions(**options)
    if layout.grid.world.group is not None and chosen.do_sample and chosen.seed is None:
        seed = torch.randint(2**62, (1,), device=layout.run.device)
        dist.broadcast(seed, 0)
        chosen = GenerationOptions(**{**options, "seed": int(seed)})
    blocks = [name for stage in layout.stages for name in stage.blocks]

    def next_logits(ids: Tensor, ctx: Context, cache: KVCache) -> Tensor:
        return _next_logits(layout, ids, ctx, cache)

    with ExitStack() as stack:
        if layout.placed.tp is not None:
            stack.enter_context(layout.placed.tp.whole_sequences())
        return generate_with(next_logits, layout.model, input_ids, attention_mask, chosen, blocks)


def _next_logits(layout: NativeLayout, ids: Tensor, ctx: Context, cache: KVCache) -> Tensor:
    """Logits (B, V) of the last position, on every rank."""
    if layout.pipeline is None:
        return layout.stages[0].next_logits(ids, ctx, cache)
    grid, placed = layout.grid, layout.placed
    out: Tensor | None = None
    for stage in layout.stages:
        shape = (*ids.shape, placed.width)
        h = None if stage.embed is not None else layout.pipeline.receive(shape)
        out = stage.next_logits(ids, ctx, cache, h)
        if stage.head is None:
            layout.pipeline.send(out)
    if not grid.last:
        out = torch.empty(0, device=grid.device)
    assert out is not None
    size = torch.tensor(out.shape[-1] if grid.last else 0, device=grid.device)
    dist.all_reduce(size, dist.ReduceOp.MAX, group=grid.pp.group)
    logits = out.float() if grid.last else torch.empty((len(ids), int(size)), device=grid.device)
    dist.broadcast(logits, grid.stage_rank(grid.pp.size - 1), group=grid.pp.group)
    return logits
