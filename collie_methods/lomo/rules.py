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


def matrix_factors(
    of_rows: Tensor, of_columns: Tensor, row: Tensor, col: Tensor, t: Tensor, finite: Tensor, shard: Shard
) -> tuple[Tensor, Tensor]:
    """(a, b) of a matrix's U = gradient * a[..., :, None] * b[..., None, :] (arXiv 2310.10195, algorithm 1),
    not yet normalised; advances the state.

    of_rows, of_columns: sums of the squared gradient along each row, fp32 (..., R), and column, (..., C),
    leading dimensions being a batch of matrices; row and col, of these shapes: moving means of the squared
    gradient; t: 0-d, updates done so far.  Where `finite` (0-d bool) is false the state stays as it is and
    the result has no meaning.
    """
    weight = _count(t, finite)
    _advance(row, shard.sum(of_rows, [-1]) / shard.shape[-1], weight, finite)
    _advance(col, shard.sum(of_columns, [-2]) / shard.shape[-2], weight, finite)
    mean_row = shard.sum(row.sum(dim=-1, keepdim=True), [-2]) / shard.shape[-2]
    return (row / mean_row).rsqrt_(), col.rsqrt()


def matrix_update(
    gradient: Tensor, row: Tensor, col: Tensor, t: Tensor, finite: Tensor, shard: Shard
) -> Tensor:
    """U of a matrix, or a batch of them, not yet normalised; gradient: fp32 (..., R, C); the state as
    `matrix_factors` has it."""
    square = gradient.square()
    a, b = matrix_factors(square.sum(dim=-1), square.sum(dim=-2), row, col, t, finite, shard)
    return torch.mul(gradient, a[..., :, None], out=square).mul_(b[..., None, :])


def vector_update(gradient: Tensor, v: Tensor, t: Tensor, finite: Tensor, shard: Shard) -> Tensor:
    """U of a vector or a single number, as `matrix_update`; v, of gradient's shape, is the moving mean."""
    weight = _count(t, finite)
    _advance(v, gradient.square(), weight, finite)
    return gradient * v.rsqrt()


def rates(
    of_parameter: Tensor, of_update: Tensor, lr: float, weight_decay: float, shard: Shard
) -> tuple[Tensor, Tensor | float]:
    """(rate, decay), 0-d, of `p ← p (1 - decay) - rate U`: decay = a wd and rate = a / max(1, RMS(U)), the
    normalisation of U, with a = lr max(1e-3, RMS(p)).

    of_parameter, of_update: sums of squares of this rank's part of p and U, 0-d fp32.
    """
    elements, dimensions = math.prod(shard.shape), range(len(shard.shape))
    of_p, of_u = ((shard.sum(s, dimensions) / elements).sqrt() for s in (of_parameter, of_update))
    a = lr * of_p.clamp(min=EPS_PARAMETER)
    return a / of_u.clamp(min=1.0), a * weight_decay if weight_decay else 0.0


def _count(t: Tensor, finite: Tensor) -> Tensor:
    """Count this update in t if it happens; returns 1 - beta_t = t^-0.8."""
    t.add_(finite)
    return t.clamp(min=1.0).pow(DECAY_EXPONENT)


def _advance(mean: Tensor, square: Tensor, weight: Tensor, finite: Tensor) -> None:
    """`mean ← beta mean + (1 - beta) (square + 1e-30)`, weight being 1 - beta, if finite."""
    mean.lerp_(torch.where(finite, square + EPS_GRADIENT, mean), weight)
