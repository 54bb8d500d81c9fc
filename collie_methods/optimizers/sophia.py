"""SophiaG's own pass: every few steps the same batch once more, with labels that the model itself draws."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from collie_core.optimizers.gradients import scaled_gradient
from collie_methods.optimizers.optimizer import RuledOptimizer
from collie_methods.optimizers.rules import SophiaG

if TYPE_CHECKING:
    from collie_core.data.batch import StepBatch

IGNORED = -100


class SophiaGOptimizer(RuledOptimizer):
    """SophiaG (Liu et al. 2023, arXiv 2305.14342): the Hessian is estimated before steps 1, 1 + every, ..."""

    def __init__(self, *args: Any, every: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self.every, self.tokens, self.estimating = every, 0, False

    def passes(self, step: StepBatch) -> list[str]:
        """The pass `hessian` first, where one is due."""
        self.tokens = step.target_tokens
        own = ["hessian"] if (step.step - 1) % self.every == 0 else []
        return own + super().passes(step)

    def loss(self, name: str) -> Callable[..., Tensor]:
        """Cross entropy with labels drawn from the model's own output (algorithm 2, lines 3 and 4)."""
        draws = (self.seed, self.step_number)

        def sampled_loss(logits: Tensor, labels: Tensor) -> Tensor:
            rows = [drawn_labels(*row, draws) for row in zip(logits, labels, strict=True)]
            return torch.stack(
                [
                    F.cross_entropy(row.float(), drawn, ignore_index=IGNORED, reduction="sum")
                    for row, drawn in zip(logits, rows, strict=True)
                ]
            ).sum()

        return sampled_loss

    def begin_pass(self, name: str, lr: float, loss_scale: float, grad_scale: float | Tensor) -> None:
        """Settings of the updates or estimates to come."""
        super().begin_pass(name, lr, loss_scale, grad_scale)
        self.estimating = name == "hessian"

    @torch.no_grad()
    def update(self, name: str, parameter: nn.Parameter, gradient: Tensor, finite: Tensor) -> None:
        """In the pass `hessian`, one parameter's estimate; else its step."""
        if not self.estimating:
            super().update(name, parameter, gradient, finite)
            return
        assert isinstance(self.rule, SophiaG)
        store = self.stores[name]["hessian"]
        gradient = scaled_gradient(gradient, self.loss_scale, 1.0, None)
        self._write(name, {"hessian": self.rule.estimate(gradient, store.read(), self.tokens)}, finite)


@torch.no_grad()
def drawn_labels(logits: Tensor, labels: Tensor, draws: tuple[int, int]) -> Tensor:
    """A label of the model's own for each target of a row; int64 (S,), -100 where labels have no target.

    logits: (S, V), beside labels (S,).  The draw depends on (seed, step) and the row's targets alone, so it
    is the same under every layout and wherever the data lies.
    """
    wanted = labels != IGNORED
    targets = labels[wanted].cpu().numpy().tobytes()
    digest = hashlib.blake2b(repr(draws).encode() + targets, digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    sums = logits[wanted].softmax(-1, dtype=torch.float32).cumsum(-1)
    numbers = torch.rand(len(sums), generator=generator).to(logits.device)
    places = torch.searchsorted(sums, (numbers * sums[:, -1]).unsqueeze(-1), right=True)
    drawn = torch.full_like(labels, IGNORED)
    drawn[wanted] = places.squeeze(-1).clamp(max=logits.shape[-1] - 1)
    return drawn
