"""The last projection and its cross entropy together: no (tokens, vocabulary) matrix is ever whole."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from collie_core.ops import cross_entropy_triton
from collie_core.ops.context import Context

IGNORED = -100

#: `(head, h, labels, ctx)` -> summed loss, with `loss` and `width` as those below take them.
LinearCrossEntropy = Callable[..., Tensor]
#: Logits (N, V) and targets (N,) -> negative log likelihood summed over targets that are not -100: 0-d fp32.
SummedLoss = Callable[[Tensor, Tensor], Tensor]

#: Logits of one chunk (rows x vocabulary): 64 MiB in fp32, and 256 in bf16.  On the CPU (E 256, V 32,000,
#: 1,024 targets) 16 Mi take 0.83x the time of `plain`, 2 Mi 1.03x; with E 1,024, 1.00x and 1.5x.  On an H200
#: adding a chunk's gradient of the head (E 4,096) to the others' takes 0.55 ms.
_CHUNK_LOGITS = {"cpu": 16 * 2**20, "cuda": 128 * 2**20}


def summed_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """The `SummedLoss` of a whole vocabulary."""
    if cross_entropy_triton.serves(logits, targets):
        return cross_entropy_triton.summed_nll(logits, targets, IGNORED)
    return plain_nll(logits, targets)


def plain_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """The same by torch's own functions: the oracle."""
    log_probabilities = F.log_softmax(logits, -1, dtype=torch.float32)
    return F.nll_loss(log_probabilities, targets, ignore_index=IGNORED, reduction="sum")


def plain(
    head: nn.Module,
    h: Tensor,
    labels: Tensor,
    ctx: Context,
    loss: SummedLoss = plain_nll,
    width: int | None = None,
) -> Tensor:
    """Summed cross entropy of `head(h)` at position t with label t + 1, in fp32: the oracle of the others.

    head: the model's own, (..., E) -> (..., V).  h: (B, S, E).  labels: int64 (B, S), -100 where no loss is
    wanted.  loss: what makes a loss of logits, where the head gives but a part of the vocabulary.
    Returns a 0-d fp32 tensor; 0 where there is no target.
    """
    return _summed_loss(head, h[:, :-1], labels[:, 1:], ctx, loss)


def chunked(
    head: nn.Module,
    h: Tensor,
    labels: Tensor,
    ctx: Context,
    loss: SummedLoss = summed_nll,
    width: int | None = None,
) -> Tensor:
    """`plain`, a few rows at a time: each chunk's logits are turned into gradients at once and freed.

    The idea is that of Hsu et al. 2024 (Liger Kernel, arXiv 2410.10989, section 3.2), for any head that
    works on each position by itself.  On the CPU only positions with a target are computed (30 % of
    them: 0.3x the time); elsewhere all are, since picking them would wait for the device.
    width: logits of a position, which decides the rows of a chunk; None takes the widest parameter's.
    """
    hidden, targets = h[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    if h.device.type == "cpu":
        wanted = (targets != IGNORED).nonzero().squeeze(1)
        if len(wanted) < len(targets):
            hidden, targets = hidden.index_select(0, wanted), targets[wanted]
    parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
    # no head is narrower than the vocabulary; a wider guess only makes the chunks smaller
    if width is None:
        width = max((parameter.shape[0] for parameter in head.parameters() if parameter.ndim), default=1)
    rows = max(1, _CHUNK_LOGITS.get(h.device.type, _CHUNK_LOGITS["cuda"]) // width)
    if len(hidden) <= rows:
        return _summed_loss(head, hidden.unsqueeze(0), targets.unsqueeze(0), ctx, loss)
    total: Tensor = _Chunked.apply(_Pieces(head, ctx, loss, rows), hidden, targets, *parameters)
    return total


def liger(
    head: nn.Module,
    h: Tensor,
    labels: Tensor,
    ctx: Context,
    loss: SummedLoss | None = None,
    width: int | None = None,
) -> Tensor:
    """`chunked` with liger-kernel's cross entropy, a Triton kernel that writes gradients over the logits.

    Where `loss` is given, as for a part of the vocabulary, it is that of `chunked`.
    """
    return chunked(head, h, labels, ctx, _liger_nll if loss is None else loss, width)


def _liger_nll(logits: Tensor, targets: Tensor) -> Tensor:
    module: Any = import_module("liger_kernel.transformers.functional")
    summed: Tensor = module.liger_cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    return summed.float()


def _summed_loss(head: nn.Module, h: Tensor, targets: Tensor, ctx: Context, loss: SummedLoss) -> Tensor:
    return loss(head(h, ctx).flatten(0, 1), targets.flatten())


class _Pieces(NamedTuple):
    """How the loss of a chunk is computed, and how many rows a chunk has."""

    head: nn.Module
    context: Context
    loss: SummedLoss
    rows: int


class _Chunked(torch.autograd.Function):
    """Computes loss and gradients in the forward; the backward only scales them."""

    @staticmethod
    def forward(ctx: Any, pieces: _Pieces, hidden: Tensor, targets: Tensor, *parameters: Tensor) -> Tensor:
        needs = ctx.needs_input_grad[1:2] + ctx.needs_input_grad[3:]
        inputs = [tensor for tensor, need in zip((hidden, *parameters), needs, strict=True) if need]
        ctx.needs, ctx.dtypes = needs, [tensor.dtype for tensor in inputs]
        loss, gradients = _loss_and_gradients(pieces, hidden, targets, inputs)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scaled = iter(
            None if total is None else torch.mul(total, gradient, out=torch.empty_like(total, dtype=dtype))
            for total, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        of_hidden, *of_parameters = (next(scaled) if need else None for need in ctx.needs)
        return None, of_hidden, None, *of_parameters


def _loss_and_gradients(
    pieces: _Pieces, hidden: Tensor, targets: Tensor, inputs: list[Tensor]
) -> tuple[Tensor, list[Tensor | None]]:
    """Summed loss of hidden (N, E), and its gradients by `inputs`: `hidden`, the head's parameters, or both.

    Sums over chunks are kept in fp32, and fp16 gradients too, since those of a summed loss may exceed its
    range before they are scaled.
    """
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    gradients: list[Tensor | None] = [None] * len(inputs)
    of_hidden = None
    if inputs and inputs[0] is hidden:
        dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
        of_hidden = gradients[0] = torch.empty_like(hidden, dtype=dtype)
    for start in range(0, len(hidden), pieces.rows):
        place = slice(start, start + pieces.rows)
        chunk = hidden[place].detach().requires_grad_(of_hidden is not None)
        with torch.set_grad_enabled(bool(inputs)):
            head, targets_here = pieces.head, targets[place].unsqueeze(0)
            loss = _summed_loss(head, chunk.unsqueeze(0), targets_here, pieces.context, pieces.loss)
        total += loss.detach()
        if not inputs:
            continue
        chunk_inputs = inputs if of_hidden is None else [chunk, *inputs[1:]]
        for index, gradient in enumerate(torch.autograd.grad(loss, chunk_inputs, allow_unused=True)):
            if index == 0 and of_hidden is not None:
                of_hidden[place] = gradient
            elif gradient is not None:
                sum_so_far = gradients[index]
                gradients[index] = gradient.float() if sum_so_far is None else sum_so_far.add_(gradient)
    return total, gradients
