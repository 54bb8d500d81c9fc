"""The kernel of AdamW's 8-bit states beside the same in PyTorch's operators and bitsandbytes."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn

from collie_core.run import ParameterGroup
from collie_methods.optimizers.eight_bit import AdamW8bit
from collie_methods.optimizers.optimizer import RuledOptimizer
from collie_methods.optimizers.rules import AdamW
from collie_methods.optimizers.stores import eight_bit

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes"),
]


def trained(kind: type[RuledOptimizer], start: Tensor, steps: int = 6) -> tuple[Tensor, dict[str, Tensor]]:
    """The weight and the states; step 3 is not finite."""
    weight = nn.Parameter(start.clone())
    rule, groups = AdamW(0.9, 0.99, 1e-8), [ParameterGroup({"w": weight}, 1.0, 0.1)]
    optimizer = kind(groups, rule, eight_bit, clip_grad_value=1.5, seed=3)
    generator = torch.Generator("cuda").manual_seed(1)
    for number in range(1, steps + 1):
        gradient = torch.randn(start.shape, generator=generator, device="cuda").to(start.dtype)
        optimizer.step_number = number
        optimizer.begin_pass("update", 1e-2, 2.0, torch.tensor(0.7, device="cuda"))
        optimizer.update("w", weight, gradient, torch.tensor(number != 3, device="cuda"))
    return weight.detach(), {key: torch.as_tensor(value) for key, value in optimizer.state_dict().items()}


@pytest.mark.parametrize("shape", [(70, 512), (33, 128), (5, 192), (1, 256), (3, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernel_follows_the_rule(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    start = torch.randn(shape, device="cuda").to(dtype)
    expected, found = trained(RuledOptimizer, start), trained(AdamW8bit, start)
    assert (expected[0] - found[0]).abs().mean() < 1e-4  # of six steps of 1e-2
    assert expected[1].keys() == found[1].keys()
    for key, value in expected[1].items():
        if key.endswith("_codes"):  # a rounding may fall on the other side
            differ = (found[1][key].int() - value.int()).abs()
            assert (differ != 0).float().mean() < 0.03
            assert differ.float().mean() < 0.06
        else:
            torch.testing.assert_close(found[1][key], value, rtol=0.02, atol=1e-6)


def test_a_step_that_is_not_finite_changes_no_bit() -> None:
    start = torch.randn(8, 256, device="cuda").bfloat16()
    done, skipped = trained(AdamW8bit, start, 2), trained(AdamW8bit, start, 3)
    assert torch.equal(done[0], skipped[0])
    for key, value in done[1].items():
        assert torch.equal(value, skipped[1][key]), key


def test_it_is_the_same_every_time() -> None:
    start = torch.randn(300, 512, device="cuda").bfloat16()
    assert torch.equal(trained(AdamW8bit, start)[0], trained(AdamW8bit, start)[0])
