"""Activation checkpointing: which blocks recompute their forward in the backward pass, and how."""

from __future__ import annotations

from collections.abc import Callable
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

#: Results that `selective` keeps: matrix products and attention, the dear part of a block.
_KEPT_OPS = frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten.bmm.default,
        torch.ops.aten._scaled_mm.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
)


def _selective_contexts() -> Any:
    def policy(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in _KEPT_OPS else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


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
            return partial(_run, blocks, mode)
    if isinstance(mode, int) and mode > total:
        message = f"{mode} blocks, but the model has {total}"
        raise run.config.problems(ConfigProblems([(("train", "activation_checkpointing"), message)]))
    if mode == "auto" and run.device.type != "cuda":
        mode = "none"
    if mode != "auto":
        run.resolved["activation_checkpointing"] = mode
        if isinstance(mode, int):
            mode = min(max(mode - begin, 0), len(blocks))
        return partial(_run, blocks, mode)
    return _Measured(blocks, run, agree, str(begin) if len(blocks) < total else None)


def _run(blocks: list[nn.Module], mode: str | int, h: Tensor, context: Context) -> Tensor:
    """Every block in turn; the first `mode` of them (all under full, selective, offload) recomputed."""
    recomputed = {"none": 0, "full": len(blocks), "selective": len(blocks), "offload": len(blocks)}.get(
        str(mode), mode
    )
    assert isinstance(recomputed, int)
    for index, block in enumerate(blocks):
        if index >= recomputed:
            h = block(h, context)
        elif mode == "selective":
            h = checkpoint(block, h, context, use_reentrant=False, context_fn=_selective_contexts)
        elif mode == "offload":
            with torch.autograd.graph.save_on_cpu(pin_memory=h.is_cuda):
                h = checkpoint(block, h, context, use_reentrant=False)
        else:
            h = checkpoint(block, h, context, use_reentrant=False)
    return h


class _Measured:
    """`auto` on CUDA: the first forward recomputes everything but counts what its first block would keep."""

    def __init__(
        self, blocks: list[nn.Module], run: Run, agree: Callable[[int], int] | None, stretch: str | None
    ) -> None:
        """stretch: the name of these blocks among all of the model; None: they are all."""
        self.blocks, self.run, self.agree, self.stretch = blocks, run, agree, stretch
        self.mode: str | int = "auto"

    def __call__(self, h: Tensor, context: Context) -> Tensor:
        if self.mode == "auto":
            chosen = self._choose(h, context)
            self.mode = chosen if self.agree is None else self.agree(chosen)
            resolved = self.run.resolved
            if self.stretch is None:
                resolved["activation_checkpointing"] = self.mode
            else:  # this rank may have several
                others = resolved.get("activation_checkpointing", {})
                resolved["activation_checkpointing"] = {**others, self.stretch: self.mode}
        return _run(self.blocks, self.mode, h, context)

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
