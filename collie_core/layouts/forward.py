"""The forward pass of a micro-batch: embed, blocks (recomputed, compiled), head and loss."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from collie_core.errors import ConfigError, UserError
from collie_core.layouts.recompute import BlockRunner, runner_for
from collie_core.models.forward import model_context
from collie_core.ops import Context

if TYPE_CHECKING:
    from collie_core.data.batch import MicroBatch
    from collie_core.ops import Ops
    from collie_core.run import Run


class Forward:
    """Runs a model's three parts and the loss; `resolve` settles compile and activation checkpointing."""

    def __init__(self, model: nn.Module, ops: Ops, run: Run) -> None:
        self.model: Any = model  # its three parts are called, whatever their classes
        self.ops, self.run = ops, run
        self.run_blocks: BlockRunner | None = None

    def resolve(self, training: bool) -> None:
        """Settle every `auto` of the forward pass, once, and note it in `run.resolved`."""
        train, resolved = self.run.config.train, self.run.resolved
        on_cuda = self.run.device.type == "cuda"
        compiled = resolved.get("compile", on_cuda if train.compile == "auto" else train.compile)
        resolved["compile"] = compiled
        if compiled:
            for block in self.model.blocks.values():
                block.compile()
        self.run_blocks = runner_for(list(self.model.blocks.values()), self.run) if training else None

    def hidden(self, batch: MicroBatch) -> tuple[Tensor, Context]:
        """Output of the last block, (rows, length, hidden), and the context of the batch."""
        context = Context.build(batch.input_ids, position_ids=batch.positions, segments=batch.segments)
        context = model_context(self.model, context)
        h = self.model.embed(batch.input_ids, context)
        if self.run_blocks is not None and self.model.training:
            return self.run_blocks(h, context), context
        for block in self.model.blocks.values():
            h = block(h, context)
        return h, context

    def summed_loss(self, batch: MicroBatch, custom: bool = True) -> Tensor:
        """Loss summed over the target tokens (0-d, fp32); the user's own loss where there is one."""
        batch = batch.to(self.run.device)
        h, context = self.hidden(batch)
        if custom and self.run.loss_fn is not None:
            return self._custom_loss(h, context, batch)
        return self.ops.linear_cross_entropy(self.model.head, h, batch.labels, context)

    def _custom_loss(self, h: Tensor, context: Context, batch: MicroBatch) -> Tensor:
        """Call `run.loss_fn` with the arguments it names; logits[:, t] stands beside labels[:, t]."""
        assert self.run.loss_fn is not None
        offered = {
            "logits": lambda: self.model.head(h, context)[:, :-1],
            "labels": lambda: batch.labels[:, 1:],
            "input_ids": lambda: batch.input_ids,
            "hidden_states": lambda: h,
            "model": lambda: self.model,
            "batch": lambda: batch,
        }
        names = [
            p.name for p in inspect.signature(self.run.loss_fn).parameters.values() if p.default is p.empty
        ]
        unknown = [name for name in names if name not in offered]
        if unknown:
            raise ConfigError(f"loss_fn takes {unknown[0]!r}, but it may take: {', '.join(offered)}")
        loss = self.run.loss_fn(**{name: offered[name]() for name in names})
        if loss.shape == batch.labels[:, 1:].shape:  # one loss a token: what has no target does not count
            loss = loss.masked_fill(batch.labels[:, 1:] == -100, 0.0).sum()
        if loss.ndim:
            raise UserError(
                f"loss_fn returned shape {tuple(loss.shape)}; expected the sum over the target tokens (0-d), "
                f"or one loss a token {tuple(batch.labels[:, 1:].shape)}"
            )
        return loss.float()
