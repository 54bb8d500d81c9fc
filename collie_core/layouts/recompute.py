"""Activation checkpointing: which blocks recompute their forward in the backward pass, and how.

`none` and `full` say it for all blocks, a number for the first so many.  `selective` recomputes all of every
block but its attention: per byte that is kept, attention saves the most time in long rows (see
docs/decisions/recomputation.md).  `offload` is `full` with the blocks' inputs in host memory, but
for the last block where its backward pass comes next.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
    alive: int = 1,
) -> BlockRunner:
    """The loop over the blocks that `train.activation_checkpointing` asks for.

    `auto` recomputes nothing on the CPU; on CUDA it measures, in the first step, what one block keeps, and
    recomputes only as many blocks as the free memory asks for; `agree` gives the most that any rank which
    shares these blocks needs.  begin, total: where these blocks begin among all of the model.  alive: passes
    through them that have begun and not ended, at most.
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
        return _runner(blocks, mode, run, alive)
    return _Measured(blocks, run, agree, str(begin) if len(blocks) < total else None, alive)


def _runner(blocks: list[nn.Module], mode: str | int, run: Run, alive: int = 1) -> BlockRunner:
    if mode == "selective":
        return partial(_run, blocks, len(blocks), _compiled_too(_selective, run))
    if mode == "offload" and run.device.type == "cuda":
        from collie_core.layouts.offload import Offloaded

        return Offloaded(blocks, run.device, _compiled_too(_full, run), last_too=alive > 1)
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
    """`auto` on CUDA: counts what a block keeps, and has as many recomputed as the free memory asks for.

    What comes later than the first forward pass takes memory too: sums of gradients, other micro-batches of a
    pipeline, optimizer states.  So in the first two steps every pass looks anew, and a block that is
    recomputed once stays so.  A pass counts as one over the largest micro-batch of the run.
    """

    def __init__(
        self,
        blocks: list[nn.Module],
        run: Run,
        agree: Callable[[int], int] | None,
        stretch: str | None,
        alive: int,
    ) -> None:
        """stretch: the name of these blocks among all of the model; None: they are all.  alive: passes whose
        backward pass comes after the next one's forward pass, and itself."""
        self.blocks, self.run, self.agree, self.stretch = blocks, run, agree, stretch
        self.alive, self._begun = alive, 0
        self.recomputed: int | None = None
        self._sizes: BlockSizes | None = None
        self._settled_at = run.step + 2
        self._again = _compiled_too(_full, run)

    def __call__(self, h: Tensor, context: Context) -> Tensor:
        if self.recomputed is not None and self.run.step >= self._settled_at:
            return _run(self.blocks, self.recomputed, self._again, h, context)
        self.recomputed = self._choose(h, context)
        h = _run(self.blocks, self.recomputed, self._again, h, context)
        if h.requires_grad:
            self._begun += 1
            h.register_hook(self._ends)
        return h

    def _choose(self, h: Tensor, context: Context) -> int:
        """As many as before, or more."""
        if self._sizes is None:
            trained = (block for block in self.blocks if any(p.requires_grad for p in block.parameters()))
            sizes = measured(next(trained, self.blocks[0]), h, context)
            torch.cuda.empty_cache()
            self._sizes = sizes.times(self.run.largest_micro_batch / context.input_ids.numel())
        asked = self._sizes.recomputed(len(self.blocks), _usable(h.device), self.alive, self._begun)
        asked = asked if self.agree is None else self.agree(asked)
        if self.recomputed is not None and asked <= self.recomputed:
            return self.recomputed
        self._tell(asked)
        return asked

    def _ends(self, _gradient: Tensor) -> None:
        self._begun -= 1

    def _tell(self, chosen: int) -> None:
        """Note the choice for run.json and for a start that goes on, and say it."""
        resolved, key = self.run.resolved, "activation_checkpointing"
        resolved[key] = chosen if self.stretch is None else {**resolved.get(key, {}), self.stretch: chosen}
        if self.run.first:
            told = f"train.{key}: auto: {chosen} of {len(self.blocks)} blocks are recomputed"
            print(told, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class BlockSizes:
    """Bytes that a block keeps of one pass for its backward pass: everything, or its input alone."""

    everything: int
    input: int

    def times(self, scale: float) -> BlockSizes:
        """Those of a pass with so many times the positions, or of the same where that is less."""
        scale = max(1.0, scale)
        return BlockSizes(int(scale * self.everything), int(scale * self.input))

    def recomputed(self, blocks: int, usable: int, alive: int = 1, begun: int = 0) -> int:
        """How many of so many blocks must keep their inputs alone.

        usable: bytes that may be taken now.  alive: passes that are alive at once; begun: those that are,
        whose memory is taken already.  There is always room for one block that is being recomputed.
        """
        passes = max(1, alive - begun)
        room = usable - self.everything - passes * blocks * self.input
        kept = max(0, room) // max(1, passes * (self.everything - self.input))
        return max(0, blocks - kept)


def measured(block: nn.Module, h: Tensor, context: Context) -> BlockSizes:
    """What a block keeps of this pass.  Its input has a gradient, as that of every block but the first has:
    below frozen embeddings the first keeps less."""
    kept: dict[int, int] = {}
    weights: set[int] = set()

    def count(tensor: Tensor) -> Tensor:
        if not weights:  # within the forward pass, where sharded weights are whole
            weights.update(p.untyped_storage().data_ptr() for p in block.parameters())
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        block(h.detach().requires_grad_(), context)
    return BlockSizes(sum(kept.values()), h.numel() * h.element_size())


def _usable(device: torch.device) -> int:
    """Bytes that may be taken; a tenth of the card is left for the loss, the largest gradients and gaps."""
    free, total = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + unused - total // 10
