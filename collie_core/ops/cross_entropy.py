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

#: Logits of one chunk (rows x vocabulary); on CUDA 2,048 rows of LLaMA's 32,000, 256 MiB in fp32.
_CHUNK_LOGITS = {"cuda": 64 * 2**20, "cpu": 2 * 2**20}

LinearCrossEntropy = Callable[[nn.Module, Tensor, Tensor, Context], Tensor]


def plain(head: nn.Module, h: Tensor, labels: Tensor, ctx: Context) -> Tensor:
    """Summed cross entropy of `head(h)` at position t with label t + 1, in fp32: the oracle of the others.

    head: the model's own, (B, S, E) -> (B, S, V).  h: (B, S, E).  labels: int64 (B, S), -100 where no loss
    is wanted.  Returns a 0-d fp32 tensor; 0 where there is no target.
    """
    logits = head(h[:, :-1], ctx).float().flatten(0, 1)
    return F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")


def chunked(head: nn.Module, h: Tensor, labels: Tensor, ctx: Context) -> Tensor:
    """`plain`, a few rows at a time: each chunk's logits are turned into gradients at once and freed.

    The idea is that of Hsu et al. 2024 (Liger Kernel, arXiv 2410.10989, section 3.2) for any head that works
    on each position by itself.  On the CPU only positions with a target are computed; elsewhere all are,
    since picking them would wait for the device.
    """
    hidden, targets = h[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    if h.device.type == "cpu":
        wanted = (targets != IGNORED).nonzero().squeeze(1)
        if len(wanted) < len(targets):
            hidden, targets = hidden.index_select(0, wanted), targets[wanted]
    training = torch.is_grad_enabled()
    parameters = [parameter for parameter in head.parameters() if training and parameter.requires_grad]
    loss: Tensor = _Chunked.apply(head, ctx, hidden, targets, *parameters)
    return loss


class _Chunked(torch.autograd.Function):
    """Computes loss and gradients in the forward; the backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any, head: nn.Module, context: Context, hidden: Tensor, targets: Tensor, *parameters: Tensor
    ) -> Tensor:
        needs = ctx.needs_input_grad[2:3] + ctx.needs_input_grad[4:]
        inputs = [tensor for tensor, need in zip((hidden, *parameters), needs, strict=True) if need]
        loss, gradients = _loss_and_gradients(head, context, hidden, targets, inputs)
        ctx.needs, ctx.dtypes = needs, [tensor.dtype for tensor in inputs]
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
        return None, None, of_hidden, None, *of_parameters


def _loss_and_gradients(
    head: nn.Module, context: Context, hidden: Tensor, targets: Tensor, inputs: list[Tensor]
) -> tuple[Tensor, list[Tensor | None]]:
    """Summed loss of rows (N, E), and its gradients by `inputs`: `hidden`, parameters of `head`, or both.

    Sums over chunks are kept in fp32 (fp16 rows too: the sum of a whole batch may exceed its range).
    """
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    gradients: list[Tensor | None] = [None] * len(inputs)
    if len(hidden) == 0:
        return total, gradients
    of_hidden = None
    if inputs and inputs[0] is hidden:
        wide = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
        of_hidden = gradients[0] = torch.empty_like(hidden, dtype=wide)
    with torch.no_grad():
        vocabulary = head(hidden[:1].unsqueeze(0), context).shape[-1]
    size = max(1, _CHUNK_LOGITS.get(hidden.device.type, _CHUNK_LOGITS["cuda"]) // vocabulary)
    for start in range(0, len(hidden), size):
        rows = hidden[start : start + size].detach().requires_grad_(of_hidden is not None)
        with torch.set_grad_enabled(bool(inputs)):
            logits = head(rows.unsqueeze(0), context).squeeze(0)
        loss, of_logits = _softmax_loss(logits.detach(), targets[start : start + size])
        total += loss
        if not inputs:
            continue
        chunk_inputs = inputs if of_hidden is None else [rows, *inputs[1:]]
        found = torch.autograd.grad(logits, chunk_inputs, of_logits.to(logits.dtype), allow_unused=True)
        for index, gradient in enumerate(found):
            if index == 0 and of_hidden is not None:
                of_hidden[start : start + size] = gradient
            elif gradient is not None:
                gradients[index] = _added(gradients[index], gradient, more=len(hidden) > size)
    return total, gradients


def _added(total: Tensor | None, gradient: Tensor, more: bool) -> Tensor:
    if total is not None:
        return total.add_(gradient)
    return gradient.float() if more or gradient.dtype == torch.float16 else gradient


def _softmax_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross entropy of logits (n, V) with targets (n,), and its gradient by the logits, in fp32."""
    logits = logits.float()
    log_sum = logits.logsumexp(-1)
    ignored = targets == IGNORED
    index = targets.masked_fill(ignored, 0).unsqueeze(-1)
    loss = (log_sum - logits.gather(-1, index).squeeze(-1)).masked_fill(ignored, 0.0).sum()
    gradient = (logits - log_sum.unsqueeze(-1)).exp_()
    gradient.scatter_add_(-1, index, torch.full_like(gradient[:, :1], -1.0))
    return loss, gradient.masked_fill_(ignored.unsqueeze(-1), 0.0)
