"""AdaLomo's kernels beside the plain rule on the CPU, which the formula tests prove."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from collie_core.run import ParameterGroup
from collie_methods.lomo.optimizer import AdaLomoOptimizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def trained(device: str, start: Tensor, scale: float) -> tuple[Tensor, dict[str, Any]]:
    weight = nn.Parameter(start.to(device, copy=True))
    group = ParameterGroup({"w": weight}, 1.0, 0.1)
    optimizer = AdaLomoOptimizer([group], clip_grad_value=0.8, seed=3)
    generator = torch.Generator().manual_seed(1)
    for number in range(1, 8):
        gradient = torch.randn(start.shape, generator=generator).to(device, start.dtype)
        optimizer.step_number = number
        optimizer.begin_pass("update", 0.05, 2.0, torch.tensor(scale, device=device))
        finite = torch.tensor(number != 3, device=device)
        optimizer.update("w", weight, gradient, finite)
    return weight.detach().cpu(), {key: value.cpu() for key, value in optimizer.state_dict().items()}


@pytest.mark.parametrize("shape", [(70, 150), (1, 4097), (513, 1), (1000, 1300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_follow_the_rule(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    start = torch.randn(shape).to(dtype)
    expected, found = (trained(device, start, 0.7) for device in ("cpu", "cuda"))
    assert not torch.equal(found[0], start)
    if dtype == torch.float32:
        assert (expected[0] - found[0]).abs().max() < 2e-6
    else:  # with the same noise, but for what falls on the other side of a rounding
        assert (expected[0] != found[0]).float().mean() < 2e-3
    for key, value in expected[1].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-5, atol=0)


def test_it_is_the_same_every_time() -> None:
    start = torch.randn(900, 700).bfloat16()
    assert torch.equal(trained("cuda", start, 1.0)[0], trained("cuda", start, 1.0)[0])
