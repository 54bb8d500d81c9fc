"""The sum of squares of a gradient, and whether it is finite."""

from __future__ import annotations

import pytest
import torch

from collie_core.ops import norm_triton

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("count", [1, 4, 40])
def test_sums_of_squares_of_tensors_of_any_size_and_dtype(count: int) -> None:
    sizes = [(1, 8192, 8193, 3_000_001)[i % 4] for i in range(count)]
    tensors = [torch.randn(n, device="cuda").to(DTYPES[i % 3]) for i, n in enumerate(sizes)]
    yes, no = (torch.tensor(flag, device="cuda") for flag in (True, False))
    squares, flags = norm_triton.squares(tensors, yes)
    expected = [tensor.double().square().sum().item() for tensor in tensors]
    assert squares.tolist() == pytest.approx(expected, rel=1e-6)
    assert flags is not None and flags.tolist() == [True] * count
    assert norm_triton.squares(tensors)[1] is None
    refused = norm_triton.squares(tensors, no)[1]
    assert refused is not None and refused.tolist() == [False] * count
    for bad in (torch.inf, -torch.inf, torch.nan):
        tensors[-1][-1] = bad
        found = norm_triton.squares(tensors, yes)[1]
        assert found is not None and found.tolist() == [True] * (count - 1) + [False]
