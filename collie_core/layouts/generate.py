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
    blocks = [name for stage in layout.stages for name in stage.blocks]
    agree = None if layout.grid.world.group is None else _of_first_rank
    with ExitStack() as stack:
        if layout.placed.tp is not None:
            stack.enter_context(layout.placed.tp.whole_sequences())
        next_logits = _NextLogits(layout)
        return generate_with(next_logits, layout.model, input_ids, attention_mask, chosen, blocks, agree)


def _of_first_rank(tokens: Tensor) -> Tensor:
    dist.broadcast(tokens, 0)
    return tokens


class _NextLogits:
    """Logits (B, V) of the last position, on every rank."""

    def __init__(self, layout: NativeLayout) -> None:
        self.layout = layout
        self._words: int | None = None  # V, which only the last stage knows before the first token

    def __call__(self, ids: Tensor, ctx: Context, cache: KVCache) -> Tensor:
        layout, grid = self.layout, self.layout.grid
        if layout.pipeline is None:
            return layout.stages[0].next_logits(ids, ctx, cache)
        out: Tensor | None = None
        for stage in layout.stages:
            shape = (*ids.shape, layout.placed.width)
            h = None if stage.embed is not None else layout.pipeline.receive(shape)
            out = stage.next_logits(ids, ctx, cache, h)
            if stage.head is None:
                layout.pipeline.send(out)
        assert out is not None
        if self._words is None:
            words = torch.tensor(out.shape[-1] if grid.last else 0, device=grid.device)
            self._words = int(grid.pp.sum(words))
        logits = out.float() if grid.last else torch.empty((len(ids), self._words), device=grid.device)
        dist.broadcast(logits, grid.stage_rank(grid.pp.size - 1), group=grid.pp.group)
        return logits
