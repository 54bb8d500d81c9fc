"""The sum of squares of a gradient, and whether it is finite."""

from __future__ import annotations

import pytest
import torch

from collie_core.ops import norm_triton

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("elements", [1, 8192, 8193, 3_000_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sum_of_squares(elements: int, dtype: torch.dtype) -> None:
    values = torch.randn(elements, device="cuda").to(dtype)
    yes, no = (torch.tensor(flag, device="cuda") for flag in (True, False))
    square, flag = norm_triton.squares(values, yes)
    assert square.item() == pytest.approx(values.double().square().sum().item(), rel=1e-6)
    assert flag is not None and flag.item() is True
    assert norm_triton.squares(values)[1] is None
    refused = norm_triton.squares(values, no)[1]
    assert refused is not None and refused.item() is False
    for bad in (torch.inf, -torch.inf, torch.nan):
        values[-1] = bad
        found = norm_triton.squares(values, yes)[1]
        assert found is not None and found.item() is False
