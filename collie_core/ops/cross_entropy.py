"""The last projection and its cross entropy together: no (tokens, vocabulary) matrix is ever whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from collie_core.ops.context import Context

IGNORED = -100

LinearCrossEntropy = Callable[[nn.Module, Tensor, Tensor, Context], Tensor]

#: Logits of one chunk (rows x vocabulary): 64 and 256 MiB in fp32.  On the CPU (E 256, V 32,000, 1,024
#: targets) 16 Mi take 0.83x the time of `plain`, 2 Mi 1.03x; with E 1,024, 1.00x and 1.5x.
_CHUNK_LOGITS = {"cpu": 16 * 2**20, "cuda": 64 * 2**20}


def plain(head: nn.Module, h: Tensor, labels: Tensor, ctx: Context) -> Tensor:
    """Summed cross entropy of `head(h)` at position t with label t + 1, in fp32: the oracle of the others.

    head: the model's own, (..., E) -> (..., V).  h: (B, S, E).  labels: int64 (B, S), -100 where no loss is
    wanted.  Returns a 0-d fp32 tensor; 0 where there is no target.
    """
    return _summed_loss(head, h[:, :-1], labels[:, 1:], ctx)


def chunked(head: nn.Module, h: Tensor, labels: Tensor, ctx: Context) -> Tensor:
    """`plain`, a few rows at a time: each chunk's logits are turned into gradients at once and freed.

    The idea is that of Hsu et al. 2024 (Liger Kernel, arXiv 2410.10989, section 3.2), for any head that
    works on each position by itself.  On the CPU only positions with a target are computed (30 % of
    them: 0.3x the time); elsewhere all are, since picking them would wait for the device.
    """
    hidden, targets = h[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    if h.device.type == "cpu":
        wanted = (targets != IGNORED).nonzero().squeeze(1)
        if len(wanted) < len(targets):
            hidden, targets = hidden.index_select(0, wanted), targets[wanted]
    parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
    # no head is narrower than the vocabulary; a wider guess only makes the chunks smaller
    width = max((parameter.shape[0] for parameter in head.parameters() if parameter.ndim), default=1)
    rows = max(1, _CHUNK_LOGITS.get(h.device.type, _CHUNK_LOGITS["cuda"]) // width)
    if len(hidden) <= rows:
        return _summed_loss(head, hidden.unsqueeze(0), targets.unsqueeze(0), ctx)
    loss: Tensor = _Chunked.apply(head, ctx, rows, hidden, targets, *parameters)
    return loss


def _summed_loss(head: nn.Module, h: Tensor, targets: Tensor, ctx: Context) -> Tensor:
    log_probabilities = F.log_softmax(head(h, ctx), -1, dtype=torch.float32).flatten(0, 1)
    return F.nll_loss(log_probabilities, targets.flatten(), ignore_index=IGNORED, reduction="sum")


class _Chunked(torch.autograd.Function):
    """Computes loss and gradients in the forward; the backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        head: nn.Module,
        context: Context,
        rows: int,
        hidden: Tensor,
        targets: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        needs = ctx.needs_input_grad[3:4] + ctx.needs_input_grad[5:]
        inputs = [tensor for tensor, need in zip((hidden, *parameters), needs, strict=True) if need]
        ctx.needs, ctx.dtypes = needs, [tensor.dtype for tensor in inputs]
        loss, gradients = _loss_and_gradients(head, context, rows, hidden, targets, inputs)
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
        return None, None, None, of_hidden, None, *of_parameters


def _loss_and_gradients(
    head: nn.Module, context: Context, rows: int, hidden: Tensor, targets: Tensor, inputs: list[Tensor]
) -> tuple[Tensor, list[Tensor | None]]:
    """Summed loss of hidden (N, E), and its gradients by `inputs`: `hidden`, parameters of `head`, or both.

    Sums over chunks are kept in fp32, and fp16 gradients too, since those of a summed loss may exceed its
    range before they are scaled.
    """
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    gradients: list[Tensor | None] = [None] * len(inputs)
    of_hidden = None
    if inputs and inputs[0] is hidden:
        dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
        of_hidden = gradients[0] = torch.empty_like(hidden, dtype=dtype)
    for start in range(0, len(hidden), rows):
        chunk = hidden[start : start + rows].detach().requires_grad_(of_hidden is not None)
        with torch.set_grad_enabled(bool(inputs)):
            loss = _summed_loss(head, chunk.unsqueeze(0), targets[start : start + rows].unsqueeze(0), context)
        total += loss.detach()
        if not inputs:
            continue
        chunk_inputs = inputs if of_hidden is None else [chunk, *inputs[1:]]
        for index, gradient in enumerate(torch.autograd.grad(loss, chunk_inputs, allow_unused=True)):
            if index == 0 and of_hidden is not None:
                of_hidden[start : start + rows] = gradient
            elif gradient is not None:
                sum_so_far = gradients[index]
                gradients[index] = gradient.float() if sum_so_far is None else sum_so_far.add_(gradient)
    return total, gradients
