"""The mathematics of AdaLomo: functions of tensors, in fp32.  (LOMO's whole rule is `descend`.)

Every tensor may be the part of a parameter that one rank holds; means are then completed by its shard.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collie_core.shard import Shard

EPS_GRADIENT = 1e-30  # added to squared gradients
EPS_PARAMETER = 1e-3  # least root mean square that a parameter is taken to have
DECAY_EXPONENT = -0.8


def matrix_update(
    gradient: Tensor, row: Tensor, col: Tensor, t: Tensor, finite: Tensor, shard: Shard
) -> Tensor:
    """U of a matrix (arXiv 2310.10195, algorithm 1), not yet normalised; advances the state.

    gradient: fp32 (..., R, C), leading dimensions being a batch of matrices; row: (..., R) and col: (..., C),
    moving means of the squared gradient; t: 0-d, updates done so far.  Where `finite` (0-d bool) is false the
    state stays as it is and the result has no meaning.
    """
    weight = _count(t, finite)
    square = gradient.square()
    _advance(row, shard.sum(square.sum(dim=-1), [-1]) / shard.shape[-1], weight, finite)
    _advance(col, shard.sum(square.sum(dim=-2), [-2]) / shard.shape[-2], weight, finite)
    mean_row = shard.sum(row.sum(dim=-1, keepdim=True), [-2]) / shard.shape[-2]
    by_row = (row / mean_row).rsqrt_()
    update = torch.mul(gradient, by_row[..., :, None], out=square)
    return update.mul_(col.rsqrt()[..., None, :])


def vector_update(gradient: Tensor, v: Tensor, t: Tensor, finite: Tensor, shard: Shard) -> Tensor:
    """U of a vector or a single number, as `matrix_update`; v, of gradient's shape, is the moving mean."""
    weight = _count(t, finite)
    _advance(v, gradient.square(), weight, finite)
    return gradient * v.rsqrt()


def rates(
    parameter: Tensor, update: Tensor, lr: float, weight_decay: float, shard: Shard
) -> tuple[Tensor, Tensor | float]:
    """(rate, decay), 0-d, of `p ← p (1 - decay) - rate U`: decay = a wd and rate = a / max(1, RMS(U)), the
    normalisation of U, with a = lr max(1e-3, RMS(p))."""
    a = lr * root_mean_square(parameter, shard).clamp(min=EPS_PARAMETER)
    return a / root_mean_square(update, shard).clamp(min=1.0), a * weight_decay if weight_decay else 0.0


def root_mean_square(tensor: Tensor, shard: Shard) -> Tensor:
    """Over all elements of the whole: 0-d, fp32."""
    square = torch.linalg.vector_norm(tensor, dtype=torch.float32).square()
    return (shard.sum(square, range(len(shard.shape))) / math.prod(shard.shape)).sqrt()


def _count(t: Tensor, finite: Tensor) -> Tensor:
    """Count this update in t if it happens; returns 1 - beta_t = t^-0.8."""
    t.add_(finite)
    return t.clamp(min=1.0).pow(DECAY_EXPONENT)


def _advance(mean: Tensor, square: Tensor, weight: Tensor, finite: Tensor) -> None:
    """`mean ← beta mean + (1 - beta) (square + 1e-30)`, weight being 1 - beta, if finite."""
    mean.lerp_(torch.where(finite, square + EPS_GRADIENT, mean), weight)
