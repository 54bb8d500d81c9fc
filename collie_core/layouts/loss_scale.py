"""Dynamic loss scaling for fp16: the scale falls at an overflow and grows again after quiet steps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class LossScale:
    """The factor that the loss is multiplied with so that fp16 gradients do not underflow.

    Halved at an overflow, doubled after `growth_interval` steps without one, as in Micikevicius et al. 2018
    (arXiv 1710.03740, section 3.2).  For other dtypes it is 1 and never moves.
    """

    def __init__(self, dtype: torch.dtype, initial: float = 2.0**16, growth_interval: int = 2000) -> None:
        self.enabled = dtype == torch.float16
        self.value = initial if self.enabled else 1.0
        self.growth_interval = growth_interval
        self.quiet_steps = 0

    def overflowed(self) -> bool:
        """Lower the scale after an overflow; False when it cannot fall further."""
        if not self.enabled or self.value <= 1.0:
            return False
        self.value, self.quiet_steps = self.value / 2, 0
        return True

    def succeeded(self) -> None:
        """Count a step without overflow."""
        if not self.enabled:
            return
        self.quiet_steps += 1
        if self.quiet_steps >= self.growth_interval:
            self.value, self.quiet_steps = min(self.value * 2, 2.0**24), 0

    def state_dict(self) -> dict[str, Tensor]:
        """scale and quiet steps, fp64."""
        return {"loss_scale": torch.tensor([self.value, float(self.quiet_steps)], dtype=torch.float64)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of state_dict."""
        value, quiet_steps = state["loss_scale"].tolist()
        self.value, self.quiet_steps = value, int(quiet_steps)
