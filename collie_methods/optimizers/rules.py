"""The mathematics: from a gradient and the states of a parameter to a direction and the states after it.

Every tensor is fp32 and of the parameter's shape; nothing is written in place, and each element is worked on
by itself, so that a part of a parameter gives the part of the result.  `t` is 0-d: the number of this update
of the parameter, from 1.  The parameter then becomes `p (1 - decay) - rate * direction`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

States = Mapping[str, Tensor]


class Rule(ABC):
    """keys: the states, zero before the first update.  unsigned: those that are never negative."""

    keys: ClassVar[tuple[str, ...]]
    unsigned: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def direction(self, gradient: Tensor, states: States, t: Tensor) -> tuple[Tensor, States]:
        """(direction, the states that changed)."""

    def rates(self, lr: float, weight_decay: float) -> tuple[float, float]:
        """(rate, decay): here of `p (1 - lr wd) - lr * direction`, decoupled weight decay."""
        return lr, lr * weight_decay


@dataclass(frozen=True)
class AdamW(Rule):
    """Loshchilov and Hutter 2017, arXiv 1711.05101, algorithm 2."""

    beta1: float
    beta2: float
    eps: float
    keys = ("exp_avg", "exp_avg_sq")
    unsigned = ("exp_avg_sq",)

    def direction(self, gradient: Tensor, states: States, t: Tensor) -> tuple[Tensor, States]:
        m = gradient.lerp(states["exp_avg"], self.beta1)
        v = (states["exp_avg_sq"] * self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        denominator = (v / _correction(self.beta2, t)).sqrt_().add_(self.eps)
        return (m / _correction(self.beta1, t)).div_(denominator), {"exp_avg": m, "exp_avg_sq": v}


@dataclass(frozen=True)
class Lion(Rule):
    """Chen et al. 2023, arXiv 2302.06675, algorithm 2."""

    beta1: float
    beta2: float
    keys = ("exp_avg",)

    def direction(self, gradient: Tensor, states: States, t: Tensor) -> tuple[Tensor, States]:
        m = states["exp_avg"]
        return gradient.lerp(m, self.beta1).sign_(), {"exp_avg": gradient.lerp(m, self.beta2)}


@dataclass(frozen=True)
class Adan(Rule):
    """Xie et al. 2022, arXiv 2208.06677, algorithm 1; betas are 1 less the paper's, and the means are
    corrected for their start from zero, both as in its authors' code."""

    beta1: float
    beta2: float
    beta3: float
    eps: float
    keys = ("exp_avg", "exp_avg_diff", "exp_avg_sq", "previous")
    unsigned = ("exp_avg_sq",)

    def direction(self, gradient: Tensor, states: States, t: Tensor) -> tuple[Tensor, States]:
        change = torch.where(t > 1, gradient - states["previous"], 0.0)
        ahead = torch.add(gradient, change, alpha=self.beta2)
        m = gradient.lerp(states["exp_avg"], self.beta1)
        v = change.lerp(states["exp_avg_diff"], self.beta2)
        n = (states["exp_avg_sq"] * self.beta3).addcmul_(ahead, ahead, value=1 - self.beta3)
        top = (m / _correction(self.beta1, t)).add_(v * (self.beta2 / _correction(self.beta2, t)))
        denominator = (n / _correction(self.beta3, t)).sqrt_().add_(self.eps)
        states = {"exp_avg": m, "exp_avg_diff": v, "exp_avg_sq": n, "previous": gradient}
        return top.div_(denominator), states

    def rates(self, lr: float, weight_decay: float) -> tuple[float, float]:
        """`(p - lr * direction) / (1 + lr wd)`, the proximal decay of the paper."""
        return lr / (1 + lr * weight_decay), lr * weight_decay / (1 + lr * weight_decay)


@dataclass(frozen=True)
class SophiaG(Rule):
    """Liu et al. 2023, arXiv 2305.14342, algorithm 3, with the estimate of the Hessian of algorithm 2."""

    beta1: float
    beta2: float
    gamma: float
    eps: float
    keys = ("exp_avg", "hessian")
    unsigned = ("hessian",)

    def direction(self, gradient: Tensor, states: States, t: Tensor) -> tuple[Tensor, States]:
        m = gradient.lerp(states["exp_avg"], self.beta1)
        curvature = (states["hessian"] * self.gamma).clamp_(min=self.eps)
        return (m / curvature).clamp_(-1.0, 1.0), {"exp_avg": m}

    def estimate(self, gradient: Tensor, hessian: Tensor, tokens: int) -> Tensor:
        """The moving mean of the Hessian's diagonal after one more Gauss-Newton-Bartlett estimate.

        gradient: of the mean loss over so many `tokens`, with labels drawn from the model's own output.
        """
        return (hessian * self.beta2).addcmul_(gradient, gradient, value=(1 - self.beta2) * tokens)


def _correction(beta: float, t: Tensor) -> Tensor:
    """1 - beta^t."""
    return 1.0 - torch.pow(beta, t)
