"""The product of a linear with both factors, and both of its gradients' factors, rounded to float8."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch.nn.functional as F
from torch import nn
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchao.float8.float8_linear import Float8Linear, matmul_with_hp_or_float8_args

if TYPE_CHECKING:
    from torch import Tensor

_MULTIPLE = 16  # of the rows, over which the weight's gradient sums


class Float8Product:
    """x (..., inputs) and a weight (outputs, inputs) -> x weightᵀ (..., outputs), in the dtype of x.

    With s = max(float8) / max|t|, of a tensor (tensorwise) or of each row that a product sums over (rowwise;
    s rounded down to a power of two), a factor t becomes float8(s t) / s.  float8 is e4m3, of the output's
    gradient e5m2 where tensorwise.  Three products: x weightᵀ, gradient weight, gradientᵀ x.  Scales are
    taken anew each time, so nothing is kept between steps.
    """

    def __init__(self, recipe: str, emulate: bool) -> None:
        config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulate)
        # torchao's own door, which also fits the compiler to float8; what it makes of one linear says how
        # the three products of any are computed
        made = convert_to_float8_training(nn.Linear(16, 16, bias=False, device="meta"), config=config)
        self.config, self.products = config, cast(Float8Linear, made).linear_mm_config

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """Differentiable in x, and in the weight where that is trained."""
        rows = x.flatten(0, -2)
        missing = -rows.shape[0] % _MULTIPLE
        if missing:  # rows of zeros change no scale and no sum
            rows = F.pad(rows, (0, 0, 0, missing))
        out: Tensor = matmul_with_hp_or_float8_args.apply(rows, weight.t(), self.products, self.config)
        if missing:
            out = out[:-missing]
        return out.view(*x.shape[:-1], out.shape[-1])
