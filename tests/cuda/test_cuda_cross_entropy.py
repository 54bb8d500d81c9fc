"""The loss on a CUDA device: each implementation that is there against the plain one, in bf16."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn

from collie_core.ops import Context, select_ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Head(nn.Module):
    """A projection to 40,000 words."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(256, 40_000, bias=False, device="cuda", dtype=torch.bfloat16)

    def forward(self, h: Tensor, ctx: Context) -> Tensor:
        out: Tensor = self.lm_head(h)
        return out


@pytest.mark.parametrize("name", ["chunked", "liger"])
def test_losses_and_gradients_are_those_of_plain(name: str) -> None:
    if name == "liger" and find_spec("liger_kernel") is None:
        pytest.skip("liger-kernel is not installed")
    torch.manual_seed(0)
    head, found = Head(), []
    h = torch.randn(2, 2048, 256, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(0, 40_000, (2, 2048), device="cuda")
    labels[:, ::3] = -100
    ctx = Context.build(labels)
    for which in (name, "plain"):
        hidden = h.clone().requires_grad_()
        loss = select_ops(cross_entropy=which, device="cuda").linear_cross_entropy(head, hidden, labels, ctx)
        (loss / 1000).backward()
        weight = head.lm_head.weight
        assert hidden.grad is not None and weight.grad is not None
        found.append((loss.detach(), hidden.grad, weight.grad))
        weight.grad = None
    for one, expected in zip(*found, strict=True):
        apart = (one.float() - expected.float()).norm() / expected.float().norm()
        assert float(apart) < 0.02
