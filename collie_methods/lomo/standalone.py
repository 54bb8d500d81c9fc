"""LOMO and AdaLomo in a plain PyTorch loop, with no trainer.

Instead of `loss.backward()`, `optimizer.step()` and `optimizer.zero_grad()`:

    optimizer = Lomo(model, lr=1e-2, clip_grad_norm=1.0)
    for batch in batches:
        optimizer.fused_backward(model(**batch).loss)

Gradients of ordinary backward passes before it, which are in `.grad`, in fp32, count in its step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from collie_core.errors import CheckpointError, UserError
from collie_core.layouts.gradients import GradientFlow, Mode
from collie_core.run import ParameterGroup
from collie_methods.lomo.optimizer import AdaLomoOptimizer, LomoOptimizer


class _FusedLoop:
    """Hooks on the parameters of a model, and the passes of a step."""

    def __init__(
        self,
        optimizer: LomoOptimizer | AdaLomoOptimizer,
        group: ParameterGroup,
        lr: float,
        clip_grad_norm: float | None,
    ) -> None:
        _check("lr", lr, above=0)
        _check("clip_grad_norm", clip_grad_norm, above=0)
        _check("clip_grad_value", optimizer.clip_grad_value, above=0)
        _check("weight_decay", group.weight_decay, least=0)
        self.lr, self.clip_grad_norm = lr, clip_grad_norm
        self._optimizer = optimizer
        self._flow = GradientFlow(group.parameters, visible=True)
        self._norm: Tensor | None = None
        self._closed = False

    def grad_norm(self, loss: Tensor) -> Tensor:
        """L2 norm of all gradients of `loss`, with what is in `.grad` (0-d, fp32); each is dropped at once.

        The backward pass keeps the graph for the next `fused_backward`, which clips by this norm.
        """
        with self._flow.earlier_kept():
            self._run(loss, "measure", keep_graph=True)
        self._norm = self._flow.norm().to(loss.device)
        return self._norm

    def fused_backward(self, loss: Tensor, lr: float | None = None) -> None:
        """The backward pass of `loss`, updating each parameter when its gradient is complete.

        lr: the rate of this step and those to come (default: as before).
        With clip_grad_norm the backward pass runs twice over the same graph: for the norm, unless
        `grad_norm(loss)` did that already, and for the updates.
        A step with a non-finite loss or norm is skipped; without clipping, so is any parameter with a
        non-finite gradient.
        """
        if lr is not None:
            _check("lr", lr, least=0)  # a schedule may end there
            self.lr = lr
        if self.clip_grad_norm is not None and self._norm is None:
            self.grad_norm(loss)
        norm, self._norm = self._norm, None
        finite = torch.isfinite(loss.detach())
        factor: float | Tensor = 1.0
        if norm is not None:
            finite = finite & torch.isfinite(norm)
        if norm is not None and self.clip_grad_norm is not None:
            factor = (self.clip_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        self._optimizer.step_number += 1
        self._optimizer.begin_pass("update", self.lr, 1.0, factor)
        self._run(loss, "update", finite=finite)
        self._optimizer.end_pass("update")

    def state_dict(self) -> dict[str, Tensor]:
        """Optimizer state by parameter, and `step`, the number of steps done (int64)."""
        return {**self._optimizer.state_dict(), "step": torch.tensor(self._optimizer.step_number)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of state_dict.  Raises CheckpointError where the state does not fit."""
        if "step" not in state:
            raise CheckpointError("the optimizer's state does not fit: step is missing")
        self._optimizer.load_state_dict({key: value for key, value in state.items() if key != "step"})
        self._optimizer.step_number = int(state["step"])

    def close(self) -> None:
        """Remove the hooks: the end of this optimizer."""
        self._flow.close()
        self._closed = True

    def _run(self, loss: Tensor, mode: Mode, finite: Tensor | None = None, keep_graph: bool = False) -> None:
        if self._closed:
            raise UserError("this optimizer is closed: make a new one over the model")
        self._flow.arm(mode, finite, self._optimizer)
        try:
            loss.backward(retain_graph=keep_graph)
            self._flow.flush()  # what accumulated of a parameter that this loss does not reach
        finally:
            self._flow.mode = "accumulate"  # the squares of the norm stay


class Lomo(_FusedLoop):
    """LOMO (Lv et al. 2023, arXiv 2306.09782) on the trainable parameters of `model`, in fp32 or bf16.

    lr: learning rate.  clip_grad_norm: limit of the gradient norm over all parameters; costs a second
    backward pass.  clip_grad_value: limit of each element of the gradient.  weight_decay: of every parameter.
    seed: of the rounding noise of bf16 parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 2e-2,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        group = _all_parameters(model, weight_decay)
        optimizer = LomoOptimizer([group], clip_grad_value=clip_grad_value, seed=seed)
        super().__init__(optimizer, group, lr, clip_grad_norm)


class AdaLomo(_FusedLoop):
    """AdaLomo (Lv et al. 2023, arXiv 2310.10195); arguments as `Lomo`'s.

    Its authors advise no norm clipping.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 5e-4,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        group = _all_parameters(model, weight_decay)
        optimizer = AdaLomoOptimizer([group], clip_grad_value=clip_grad_value, seed=seed)
        super().__init__(optimizer, group, lr, clip_grad_norm)


def _check(name: str, value: float | None, above: float = -math.inf, least: float = -math.inf) -> None:
    """Raises UserError for a number that is not finite, not `above` a limit or not at `least` another."""
    if value is not None and not (math.isfinite(value) and value > above and value >= least):
        limit = f">= {least}" if least > above else f"> {above}"
        raise UserError(f"{name}: expected a number {limit}, got {value!r}")


def _all_parameters(model: nn.Module, weight_decay: float) -> ParameterGroup:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in parameters.items():
        if parameter.dtype == torch.float16:
            raise UserError(
                f"{name} is float16, which needs the loss scaling of collie_core's Trainer; use bfloat16 here"
            )
        if parameter.dtype not in (torch.float32, torch.bfloat16):
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise UserError(f"{name} is {dtype}, expected float32 or bfloat16")
    if not parameters:
        raise UserError("the model has no parameter to train: none has requires_grad")
    return ParameterGroup(parameters, 1.0, weight_decay)
