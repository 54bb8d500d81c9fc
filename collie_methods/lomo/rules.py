"""The mathematics of AdaLomo: functions of tensors, in fp32.  (LOMO's whole rule is `descend`.)

Reductions are functions of their own, `mean_of_rows`, `mean_of_columns` and `root_mean_square`: what a
sharded form must complete over ranks is in them alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS_GRADIENT = 1e-30  # added to squared gradients
EPS_PARAMETER = 1e-3  # least root mean square that a parameter is taken to have
DECAY_EXPONENT = -0.8


def matrix_update(gradient: Tensor, row: Tensor, col: Tensor, t: Tensor, finite: Tensor) -> Tensor:
    """U of a matrix (arXiv 2310.10195, algorithm 1), not yet normalised; advances the state.

    gradient: fp32 (..., R, C), leading dimensions being a batch of matrices; row: (..., R) and col: (..., C),
    moving means of the squared gradient; t: 0-d, updates done so far.  Where `finite` (0-d bool) is false the
    state stays as it is and the result has no meaning.
    """
    weight = _count(t, finite)
    square = gradient.square()
    _advance(row, mean_of_columns(square), weight, finite)
    _advance(col, mean_of_rows(square), weight, finite)
    by_row = (row / row.mean(dim=-1, keepdim=True)).rsqrt_()
    update = torch.mul(gradient, by_row[..., :, None], out=square)
    return update.mul_(col.rsqrt()[..., None, :])


def vector_update(gradient: Tensor, v: Tensor, t: Tensor, finite: Tensor) -> Tensor:
    """U of a vector or a single number, as `matrix_update`; v, of gradient's shape, is the moving mean."""
    weight = _count(t, finite)
    _advance(v, gradient.square(), weight, finite)
    return gradient * v.rsqrt()


def rates(parameter: Tensor, update: Tensor, lr: float, weight_decay: float) -> tuple[Tensor, Tensor | float]:
    """(rate, decay), 0-d, of `p ← p (1 - decay) - rate U`: decay = a wd and rate = a / max(1, RMS(U)), the
    normalisation of U, with a = lr max(1e-3, RMS(p))."""
    a = lr * root_mean_square(parameter).clamp(min=EPS_PARAMETER)
    return a / root_mean_square(update).clamp(min=1.0), a * weight_decay if weight_decay else 0.0


def mean_of_columns(square: Tensor) -> Tensor:
    """(..., R, C) -> (..., R)."""
    return square.mean(dim=-1)


def mean_of_rows(square: Tensor) -> Tensor:
    """(..., R, C) -> (..., C)."""
    return square.mean(dim=-2)


def root_mean_square(tensor: Tensor) -> Tensor:
    """Over all elements: 0-d, fp32."""
    return torch.linalg.vector_norm(tensor, dtype=torch.float32) / tensor.numel() ** 0.5


def _count(t: Tensor, finite: Tensor) -> Tensor:
    """Count this update in t if it happens; returns 1 - beta_t = t^-0.8."""
    t.add_(finite)
    return t.clamp(min=1.0).pow(DECAY_EXPONENT)


def _advance(mean: Tensor, square: Tensor, weight: Tensor, finite: Tensor) -> None:
    """`mean ← beta mean + (1 - beta) (square + 1e-30)`, weight being 1 - beta, if finite."""
    mean.lerp_(torch.where(finite, square + EPS_GRADIENT, mean), weight)
