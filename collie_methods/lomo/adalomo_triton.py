"""AdaLomo's update of a matrix on CUDA: three passes over the gradient, none of which writes a matrix but the
weight.

`rules` is the reference; in PyTorch it makes some ten passes, most of them in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from collie_core.ops import rounding_triton
from collie_core.ops.rounding import Noise, counters

_ROWS, _COLUMNS = 32, 128


def serves(target: Tensor, gradient: Tensor, finite: Tensor) -> bool:
    """Whether the kernels can be used: for a matrix, on CUDA."""
    return target.ndim == 2 and rounding_triton.serves(target, gradient, finite)


@dataclass(frozen=True)
class Matrix:
    """target: the weight (R, C), of any dtype, contiguous.  gradient: of its shape, any dtype; what is used
    is `clamp(gradient / loss_scale, ±clip_value) * grad_scale`, grad_scale being a number or 0-d."""

    target: Tensor
    gradient: Tensor
    loss_scale: float
    clip_value: float | None
    grad_scale: float | Tensor

    def moments(self) -> tuple[Tensor, Tensor]:
        """Sums of the squared gradient: of each row, (R,), and of each column, (C,), in fp32."""
        rows, columns = self.target.shape
        high, wide = self._tiles
        of_rows, of_columns = self._new(wide, rows), self._new(high, columns)
        self._run(_kernels().moments, self.gradient, of_rows, of_columns, rows, columns, *self._scaling)
        return of_rows.sum(0), of_columns.sum(0)

    def squares(self, by_row: Tensor, by_column: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of squares of the target and of U = gradient * by_row[:, None] * by_column: 0-d, fp32."""
        high, wide = self._tiles
        of_update, of_target = self._new(high * wide), self._new(high * wide)
        tensors = (self.target, self.gradient, by_row, by_column, of_update, of_target)
        self._run(_kernels().squares, *tensors, *self.target.shape, *self._scaling)
        return of_target.sum(), of_update.sum()

    def descend(
        self,
        by_row: Tensor,
        by_column: Tensor,
        source: Noise,
        *,
        finite: Tensor,
        rate: Tensor,
        decay: Tensor | float,
    ) -> None:
        """`p ← p (1 - decay) - rate U`, rounded with the noise of `source`; nothing where not `finite`."""
        place = counters(self.target, source)
        self._run(
            _kernels().descend,
            *(self.target, self.gradient, by_row, by_column, finite, rate),
            *rounding_triton.number(decay),
            *self.target.shape,
            *self._scaling,
            *(place.starts, place.length, place.origin, place.key),
            STOCHASTIC=self.target.dtype == torch.bfloat16,
        )

    @property
    def _tiles(self) -> tuple[int, int]:
        rows, columns = self.target.shape
        return -(-rows // _ROWS), -(-columns // _COLUMNS)

    @property
    def _scaling(self) -> tuple[float, float | None, float, Tensor | None]:
        return float(self.loss_scale), self.clip_value, *rounding_triton.number(self.grad_scale)

    def _new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.target.device)

    def _run(self, kernel: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        if self.target.numel():
            kernel[self._tiles](*arguments, ROWS=_ROWS, COLUMNS=_COLUMNS, **options)  # type: ignore[index]


@cache
def _kernels() -> Any:
    from collie_methods.lomo import adalomo_kernels

    return adalomo_kernels
