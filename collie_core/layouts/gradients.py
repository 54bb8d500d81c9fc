"""Gradients as they become complete: measured, kept, or handed to a fused optimizer and freed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

Mode = Literal["accumulate", "keep", "measure", "update"]
Update = Callable[[str, nn.Parameter, Tensor, Tensor], None]


class GradientFlow:
    """A post-accumulate hook on every trainable parameter, armed for the last micro-batch of a pass.

    Unarmed ("accumulate") a gradient simply adds up in `.grad`.  Armed, its squared norm is taken and then
    "keep" leaves it, "measure" drops it, and "update" hands it to the optimizer's `update` and drops it, so
    that only the few gradients between two hooks are ever alive.

    Register after the parameters are final: a hook on a parameter that is replaced later never fires.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)
        self.mode: Mode = "accumulate"
        self.finite: Tensor | None = None
        self.update: Update | None = None
        self.squares: list[Tensor] = []
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._hook(name))
            for name, parameter in self.parameters.items()
        ]

    def arm(self, mode: Mode, finite: Tensor | None = None, update: Update | None = None) -> None:
        """Say what is done with each gradient from now on; `finite` is the loss's flag (0-d bool)."""
        self.mode, self.finite, self.update = mode, finite, update
        self.squares = []

    def norm(self) -> Tensor:
        """L2 norm (0-d, fp32) of all gradients that became complete since `arm`."""
        if not self.squares:
            return torch.zeros(())
        return torch.stack(self.squares).sum().sqrt()

    def kept(self) -> list[tuple[str, nn.Parameter, Tensor]]:
        """(name, parameter, gradient) of every gradient that is alive."""
        return [(name, p, p.grad) for name, p in self.parameters.items() if p.grad is not None]

    def drop(self) -> None:
        """Free every gradient."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def complete(parameter: Tensor) -> None:
            gradient = parameter.grad
            if self.mode == "accumulate" or gradient is None:
                return
            square = torch.linalg.vector_norm(gradient, dtype=torch.float32).square()
            self.squares.append(square)
            if self.mode == "update":
                assert self.update is not None and self.finite is not None
                # the whole parameter is updated or not: one bad element leaves all of it as it was
                self.update(name, self.parameters[name], gradient, self.finite & torch.isfinite(square))
            if self.mode != "keep":
                parameter.grad = None

        return complete
