"""The part of a model that one rank runs: embedding, blocks and head, or a stretch of them, and the loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from collie_core.data.batch import MicroBatch
from collie_core.errors import ConfigError, UserError
from collie_core.layouts.recompute import BlockRunner, runner_for
from collie_core.models.forward import model_context
from collie_core.ops import Context, KVCache
from collie_core.ops.context import Records

if TYPE_CHECKING:
    from collie_core.layouts.tensor_parallel import TensorParallel
    from collie_core.layouts.vocabulary import Vocabulary
    from collie_core.ops import Ops
    from collie_core.run import Run


class Stage(nn.Module):
    """A stretch of a model's blocks, with the embedding in front and the head behind where it has them.

    Children have the names that they have in the model, and so have their parameters.
    """

    def __init__(
        self,
        model: Any,
        blocks: nn.ModuleDict,
        ops: Ops,
        run: Run,
        *,
        first: bool = True,
        last: bool = True,
        tp: TensorParallel | None = None,
        vocabulary: Vocabulary | None = None,
        begin: int = 0,
        total: int | None = None,
        trains_before: bool = False,
        trains: bool = True,
    ) -> None:
        """begin, total: where the blocks begin among all of the model.  tp: the ranks that share each layer.
        vocabulary: this rank's words, where the head is cut.  trains_before: stages before this one train
        something; trains: they or this one do.
        """
        super().__init__()
        self.embed: nn.Module | None = model.embed if first else None
        self.blocks = blocks
        self.head: nn.Module | None = model.head if last else None
        self.ops, self.run, self.tp, self.vocabulary = ops, run, tp, vocabulary
        self.loss_fn = run.loss_fn
        self.begin, self.total = begin, len(blocks) if total is None else total
        self.trains_before, self.trains = trains_before, trains
        self._as_context: Callable[[Context], Context] = lambda ctx: model_context(model, ctx)
        self.run_blocks: BlockRunner | None = None
        self.compiled = False
        self._most_rows = {True: 0, False: 0}  # of a batch so far, by whether it trains

    def resolve(
        self,
        training: bool,
        agree: Callable[[int], int] | None = None,
        may_compile: bool = True,
        alive: int = 1,
    ) -> None:
        """Settle every `auto` of the forward pass, once, and note it in `run.resolved`.

        agree: makes one number of the numbers of all ranks of this stage.  may_compile: false where `auto`
        must not compile.  alive: passes through this stage that have begun and not ended, at most.
        """
        train, resolved = self.run.config.train, self.run.resolved
        on_cuda = self.run.device.type == "cuda" and may_compile
        compiled = resolved.get("compile", on_cuda if train.compile == "auto" else train.compile)
        resolved["compile"] = self.compiled = compiled
        blocks = list(self.blocks.values())
        if compiled:
            # in a pipeline several rows of different lengths are alive: what recomputes one must be the graph
            # that computed it, so there may be but one
            several = self.total > len(blocks) and train.activation_checkpointing != "none"
            for block in blocks:
                block.compile(dynamic=True if several else None)
        self.run_blocks = (
            runner_for(blocks, self.run, agree, self.begin, self.total, alive) if training else None
        )

    def forward(self, batch: MicroBatch, h: Tensor | None = None, custom: bool = True) -> Tensor:
        """The loss summed over the target tokens (0-d, fp32) where the head is here, else the hidden output.

        h: what the stage before gave, (rows, length, hidden), its length cut under sequence parallelism.
        custom: use `loss_fn` where there is one.
        """
        batch = _padded(batch, self._multiple, self._rows(batch)).to(self.run.device)
        context = Context.build(
            batch.input_ids, position_ids=batch.positions, segments=batch.segments, records=batch.bounds
        )
        context = self._as_context(context)
        self.ops.prepare(context)
        if self.embed is not None:
            h = self._split(self.embed(batch.input_ids, context))
        assert h is not None
        h = self._blocks(h, context)
        if self.head is None:
            return h
        h = self.tp.join(h) if self.tp is not None else h
        if custom and self.loss_fn is not None:
            return self._custom_loss(h, context, batch)
        return self.ops.linear_cross_entropy(self.head, h, batch.labels, context)

    def length(self, batch: MicroBatch) -> int:
        """The length of the hidden output for a batch, as this rank holds it."""
        whole = -(-batch.input_ids.shape[1] // self._multiple) * self._multiple
        return whole // self._multiple

    def next_logits(self, ids: Tensor, ctx: Context, cache: KVCache, h: Tensor | None = None) -> Tensor:
        """Logits (B, V) after the last position where the head is here, else the hidden output."""
        if self.embed is not None:
            h = self.embed(ids, ctx)
        assert h is not None
        for name, block in self.blocks.items():
            h = block(h, ctx.with_cache(cache.layers[name]))
        if self.head is None:
            return h
        logits: Tensor = self.head(h[:, -1:], ctx)[:, -1]
        return logits if self.vocabulary is None else self.vocabulary.whole(logits)

    @property
    def _multiple(self) -> int:
        """What lengths must be a multiple of."""
        return self.tp.size if self.tp is not None and self.tp.sequence_parallel else 1

    def _rows(self, batch: MicroBatch) -> int:
        """Rows that a batch is filled up to: where blocks are compiled, a last, smaller one gets the size of
        those before, and nothing is compiled for it.  A `loss_fn` sees what is there and no more.
        """
        if not self.compiled or self.embed is None or self.head is None or self.loss_fn is not None:
            return 0
        most = self._most_rows[self.training] = max(self._most_rows[self.training], len(batch.input_ids))
        return most

    def _split(self, h: Tensor) -> Tensor:
        return self.tp.split(h) if self.tp is not None else h

    def _blocks(self, h: Tensor, context: Context) -> Tensor:
        if self.run_blocks is not None and self.training:
            return self.run_blocks(h, context)
        for block in self.blocks.values():
            h = block(h, context)
        return h

    def _logits(self, h: Tensor, context: Context) -> Tensor:
        assert self.head is not None
        logits: Tensor = self.head(h, context)
        return logits if self.vocabulary is None else self.vocabulary.whole(logits)

    def _custom_loss(self, h: Tensor, context: Context, batch: MicroBatch) -> Tensor:
        """Call `loss_fn` with the arguments it names; logits[:, t] stands beside labels[:, t]."""
        assert self.loss_fn is not None
        offered = {
            "logits": lambda: self._logits(h, context)[:, :-1],
            "labels": lambda: batch.labels[:, 1:],
            "input_ids": lambda: batch.input_ids,
            "hidden_states": lambda: h,
            "model": lambda: self,
            "batch": lambda: batch,
        }
        names = [p.name for p in inspect.signature(self.loss_fn).parameters.values() if p.default is p.empty]
        unknown = [name for name in names if name not in offered]
        if unknown:
            raise ConfigError(f"loss_fn takes {unknown[0]!r}, but it may take: {', '.join(offered)}")
        loss = self.loss_fn(**{name: offered[name]() for name in names})
        if not isinstance(loss, Tensor):
            raise UserError(f"loss_fn returned {loss!r}; expected a tensor")
        if torch.is_grad_enabled() and self.trains and not loss.requires_grad:
            raise UserError(
                "loss_fn returned a tensor that needs no gradient: it does not depend on the model"
            )
        if loss.shape == batch.labels[:, 1:].shape:  # one loss a token: what has no target does not count
            loss = loss.masked_fill(batch.labels[:, 1:] == -100, 0.0).sum()
        if loss.ndim:
            raise UserError(
                f"loss_fn returned shape {tuple(loss.shape)}; expected the sum over the target tokens (0-d), "
                f"or one loss a token {tuple(batch.labels[:, 1:].shape)}"
            )
        return loss.float()


def _padded(batch: MicroBatch, multiple: int, rows: int) -> MicroBatch:
    """The batch in host memory with masked padding: on the right up to a multiple, and rows up to a number.

    It changes nothing before it.
    """
    height, length = batch.input_ids.shape
    right, below = -length % multiple, max(0, rows - height)
    if not right and not below:
        return batch

    def pad(tensor: Tensor | None, value: int) -> Tensor | None:
        return None if tensor is None else F.pad(tensor, (0, right, 0, below), value=value)

    ids, labels = pad(batch.input_ids, 0), pad(batch.labels, -100)
    assert ids is not None and labels is not None
    positions, segments = pad(batch.positions, 0), pad(batch.segments, 0)
    bounds = None if segments is None else Records.of(segments)
    return MicroBatch(ids, labels, positions, segments, batch.records, batch.tokens, bounds)
