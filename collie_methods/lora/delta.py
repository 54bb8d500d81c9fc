"""The change that LoRA makes to a linear."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from collie_core.plugin import AdaptedLinear, Delta, linear_dtype


class LoraDelta(Delta):
    """W x + s B A x, with A (r, inputs) and B (outputs, r) (Hu et al. 2021, arXiv 2106.09685, eq. 3).

    DoRA: times magnitude / ||W + s B A||, row by row, the norm being taken for a constant (Liu et al. 2024,
    arXiv 2402.09353, eq. 5 and section 4.3).
    PiSSA (Meng et al. 2024, arXiv 2404.02948): A and B begin as the principal part of W, which is then
    taken from W.  Here W stays as it is, and the frozen beginnings are taken from the product:
    W x + s (B A - start_B start_A) x.
    """

    along_outputs = {"lora_B": 0, "start_B": 0, "magnitude": 0}
    along_inputs = {"lora_A": 1, "start_A": 1}

    def __init__(
        self, linear: nn.Linear, r: int, scaling: float, *, dropout: float, dora: bool, pissa: bool
    ) -> None:
        super().__init__()
        self.scaling, self.dropout = scaling, dropout
        inputs, outputs = linear.in_features, linear.out_features

        def parameter(*shape: int, trained: bool = True) -> nn.Parameter:
            device, dtype = linear.weight.device, linear_dtype(linear)
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype), trained)

        self.lora_A, self.lora_B = parameter(r, inputs), parameter(outputs, r)
        self.start_A = parameter(r, inputs, trained=False) if pissa else None
        self.start_B = parameter(outputs, r, trained=False) if pissa else None
        self.magnitude = parameter(outputs) if dora else None

    def matrices(self) -> tuple[Tensor, Tensor]:
        """(A, B) whose product is the whole change, over s."""
        if self.start_A is None or self.start_B is None:
            return self.lora_A, self.lora_B
        return torch.cat([self.lora_A, self.start_A]), torch.cat([self.lora_B, -self.start_B], 1)

    def forward(self, x: Tensor, product: Tensor, linear: AdaptedLinear) -> Tensor:
        """As `Delta.forward`; dropout is of what goes into A alone."""
        a, b = self.matrices()
        low = F.linear(F.dropout(x, self.dropout, self.training), a)
        out = product + F.linear(low, b) * self.scaling
        if self.magnitude is None:
            return out
        with torch.no_grad():
            square = _rows(linear.matrix(torch.float32) + self.scaling * (b.float() @ a.float()))
            norm = linear.sum_over_inputs(square).sqrt()
        return out * (self.magnitude / norm.to(self.magnitude.dtype))

    def merge(self, weight: Tensor) -> Tensor:
        """As `Delta.merge`."""
        a, b = (matrix.detach().float() for matrix in self.matrices())
        merged = weight + self.scaling * (b @ a)
        if self.magnitude is None:
            return merged
        return merged * (self.magnitude.detach().float() / _rows(merged).sqrt()).unsqueeze(1)


def _rows(matrix: Tensor) -> Tensor:
    """The sum of squares of each row, fp32."""
    return torch.linalg.vector_norm(matrix, dim=1, dtype=torch.float32).square()
