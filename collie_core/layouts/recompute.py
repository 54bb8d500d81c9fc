"""Activation checkpointing: which blocks recompute their forward in the backward pass, and how.

`none` and `full` say it for all blocks, a number for the first so many.  `selective` recomputes all of every
block but its attention: per byte that is kept, attention saves the most time in long rows (see
docs/decisions/recomputation.md).  `offload` is `full` with the blocks' inputs in host memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from sys import stderr
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from collie_core.config.problems import ConfigProblems

if TYPE_CHECKING:
    from collie_core.ops import Context
    from collie_core.run import Run

BlockRunner = Callable[[Tensor, "Context"], Tensor]
RecomputedBlock = Callable[[nn.Module, Tensor, "Context"], Tensor]


def runner_for(
    blocks: list[nn.Module],
    run: Run,
    agree: Callable[[int], int] | None = None,
    begin: int = 0,
    total: int | None = None,
) -> BlockRunner:
    """The loop over the blocks that `train.activation_checkpointing` asks for.

    `auto` recomputes nothing on the CPU; on CUDA it measures, in the first step, what one block keeps, and
    recomputes only as many blocks as the free memory asks for; `agree` gives the most that any rank which
    shares these blocks needs.  begin, total: where these blocks begin among all of the model.
    Raises ConfigProblems for a number above the number of the model's blocks.
    """
    mode = run.resolved.get("activation_checkpointing", run.config.train.activation_checkpointing)
    total = len(blocks) if total is None else total
    if isinstance(mode, dict):  # measured by an earlier start, by stretch
        mode = mode.get(str(begin), "auto")
        if mode != "auto":
            return _runner(blocks, mode, run)
    if isinstance(mode, int) and mode > total:
        message = f"{mode} blocks, but the model has {total}"
        raise run.config.problems(ConfigProblems([(("train", "activation_checkpointing"), message)]))
    if mode == "auto" and run.device.type != "cuda":
        mode = "none"
    if mode != "auto":
        run.resolved["activation_checkpointing"] = mode
        if isinstance(mode, int):
            mode = min(max(mode - begin, 0), len(blocks))
        return _runner(blocks, mode, run)
    return _Measured(blocks, run, agree, str(begin) if len(blocks) < total else None)


def _runner(blocks: list[nn.Module], mode: str | int, run: Run) -> BlockRunner:
    if mode == "selective":
        return partial(_run, blocks, len(blocks), _compiled_too(_selective, run))
    if mode == "offload" and run.device.type == "cuda":
        from collie_core.layouts.offload import Offloaded

        return Offloaded(blocks, run.device)
    recomputed = {"none": 0, "full": len(blocks), "offload": len(blocks)}.get(str(mode), mode)
    assert isinstance(recomputed, int)
    return partial(_run, blocks, recomputed, _compiled_too(_full, run))


def _run(
    blocks: list[nn.Module], recomputed: int, again: RecomputedBlock, h: Tensor, context: Context
) -> Tensor:
    """Every block in turn; the first `recomputed` of them from their inputs."""
    for index, block in enumerate(blocks):
        h = again(block, h, context) if index < recomputed else block(h, context)
    return h


def _full(block: nn.Module, h: Tensor, context: Context) -> Tensor:
    """The block; its backward pass computes all of it again."""
    result: Tensor = checkpoint(lambda h: block(h, context), h, use_reentrant=False)
    return result


def _selective(block: nn.Module, h: Tensor, context: Context) -> Tensor:
    """The block; its backward pass computes all of it again but its attention."""
    result: Tensor = checkpoint(
        lambda h: block(h, context), h, use_reentrant=False, context_fn=_attention_kept
    )
    return result


def _compiled_too(recomputed: RecomputedBlock, run: Run) -> RecomputedBlock:
    """The same, compiled where blocks are.

    What is kept must be chosen within their graph, and what nobody needs again (the last projection, a fifth
    of a block) is left out there.  Blocks that ZeRO gathers are checkpointed around their graph: the
    gathering is no part of it.
    """
    if not run.resolved.get("compile"):
        return recomputed
    from torch.distributed.fsdp import FSDPModule

    inside = torch.compile(recomputed)

    def chosen(block: nn.Module, h: Tensor, context: Context) -> Tensor:
        outside = recomputed is _full and isinstance(block, FSDPModule)
        return (recomputed if outside else inside)(block, h, context)

    return chosen


def _attention_kept() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    """Every kernel of attention says what it is: torch's, its custom operators, and those of packages."""
    name = op.name()
    kept = "attention" in name or "attn" in name
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


class _Measured:
    """`auto` on CUDA: the first forward recomputes everything but counts what its first block would keep."""

    def __init__(
        self, blocks: list[nn.Module], run: Run, agree: Callable[[int], int] | None, stretch: str | None
    ) -> None:
        """stretch: the name of these blocks among all of the model; None: they are all."""
        self.blocks, self.run, self.agree, self.stretch = blocks, run, agree, stretch
        self.recomputed: int | None = None
        self._again = _compiled_too(_full, run)

    def __call__(self, h: Tensor, context: Context) -> Tensor:
        if self.recomputed is None:
            chosen = self._choose(h, context)
            self.recomputed = chosen if self.agree is None else self.agree(chosen)
            self._tell(self.recomputed)
        return _run(self.blocks, self.recomputed, self._again, h, context)

    def _tell(self, chosen: int) -> None:
        """Note the choice for run.json and for a start that goes on, and say it."""
        resolved, key = self.run.resolved, "activation_checkpointing"
        resolved[key] = chosen if self.stretch is None else {**resolved.get(key, {}), self.stretch: chosen}
        if self.run.first:
            told = f"train.{key}: auto: {chosen} of {len(self.blocks)} blocks are recomputed"
            print(told, file=stderr, flush=True)

    def _choose(self, h: Tensor, context: Context) -> int:
        kept: dict[int, int] = {}
        weights: set[int] = set()

        def count(tensor: Tensor) -> Tensor:
            if not weights:  # within the forward pass, where sharded weights are whole
                weights.update(p.untyped_storage().data_ptr() for p in self.blocks[0].parameters())
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            probe = self.blocks[0](h, context)
        del probe
        torch.cuda.empty_cache()
        block_bytes = sum(kept.values())
        input_bytes = h.numel() * h.element_size()
        free, total = torch.cuda.mem_get_info(h.device)
        # a tenth of the card is left for the loss, the largest gradients and fragmentation
        budget = free - 0.1 * total - block_bytes
        keep_all = int(max(0.0, budget - input_bytes * len(self.blocks)) // max(1, block_bytes - input_bytes))
        return max(0, len(self.blocks) - keep_all)
