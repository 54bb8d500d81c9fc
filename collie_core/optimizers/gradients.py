"""The true gradient behind what the backward pass left, and the size of a tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def scaled_gradient(
    gradient: Tensor, loss_scale: float, grad_scale: float | Tensor, clip_value: float | None
) -> Tensor:
    """`clamp(gradient / loss_scale, ±clip_value) * grad_scale` in fp32, of gradient's shape.

    loss_scale: what the loss was multiplied with (1 but for fp16).
    grad_scale: the factor of norm clipping, a float or a 0-d tensor; the norm is that before value clipping.
    clip_value: None clamps nothing.

    Where nothing changes the result is `gradient` itself, so do not write into it.
    """
    result = gradient.float()
    if loss_scale != 1.0:
        result = result / loss_scale
    if clip_value is not None:
        result = result.clamp(-clip_value, clip_value)
    if isinstance(grad_scale, Tensor) or grad_scale != 1.0:
        result = result * grad_scale
    return result


def sum_of_squares(tensor: Tensor) -> Tensor:
    """Over all elements: 0-d, fp32.  On the CPU row by row: over a matrix of 4096 x 4096 at once torch is
    0.1 % off."""
    if tensor.device.type == "cpu" and tensor.ndim > 1:
        return torch.linalg.vector_norm(tensor, dim=-1, dtype=torch.float32).square().sum()
    return torch.linalg.vector_norm(tensor, dtype=torch.float32).square()
