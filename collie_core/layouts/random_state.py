"""The random state of a step, to be replayed by a second pass over the same batch."""

from __future__ import annotations

import torch


class RandomState:
    """A snapshot of torch's generators on the CPU and on `device`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def rewind(self) -> None:
        """Set the generators back to the snapshot."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)
