"""AdamW's kernel beside torch's AdamW in float64, and its noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from collie_core.ops.rounding import Noise
from collie_core.optimizers import adam_triton

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

GROUP = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def states(like: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    zeros = {key: torch.zeros_like(like, dtype=dtype) for key in adam_triton.STATES}
    return {"step": torch.zeros((), device="cuda"), **zeros}


def step(weight: Tensor, gradient: Tensor, state: dict[str, Tensor], number: int, **changes: Any) -> None:
    place = {key: changes.pop(key) for key in ("offset", "global_shape") if key in changes}
    options: dict[str, Any] = {"loss_scale": 1.0, "clip_value": None, "grad_scale": 1.0}
    options["finite"] = torch.ones((), dtype=torch.bool, device="cuda")
    source = Noise(seed=1, step=number, name="weight", **place)
    adam_triton.step(weight, gradient, state, GROUP, source, **(options | changes))


def test_it_serves_plain_adamw_alone() -> None:
    weight = torch.nn.Parameter(torch.zeros(4, device="cuda"))
    finite = torch.ones((), dtype=torch.bool, device="cuda")
    for kind, options, served in (
        (torch.optim.AdamW, {}, True),
        (torch.optim.AdamW, {"amsgrad": True}, False),
        (torch.optim.Adam, {}, False),
    ):
        optimizer = kind([weight], fused=True, **options)
        assert adam_triton.serves(optimizer, weight, torch.zeros_like(weight), finite) == served


def test_fp32_follows_torch_in_float64() -> None:
    torch.manual_seed(0)
    weight = torch.randn(300, 70, device="cuda")
    exact = torch.nn.Parameter(weight.double())
    peer = torch.optim.AdamW([exact], **GROUP)  # type: ignore[arg-type]
    state = states(weight, torch.float32)
    scale = torch.tensor(0.5, device="cuda")
    for number in range(1, 21):
        gradient = torch.randn_like(weight)
        exact.grad = (gradient.double() / 4).clamp(-0.3, 0.3) * 0.5
        peer.step()
        step(weight, gradient, state, number, loss_scale=4.0, clip_value=0.3, grad_scale=scale)
    assert (weight - exact).abs().max() < 2e-6
    assert (state["exp_avg_sq"] - peer.state[exact]["exp_avg_sq"]).abs().max() < 1e-8
    assert state["step"].item() == 20


def test_nothing_changes_where_it_is_not_finite() -> None:
    weight = torch.randn(64, 64, device="cuda", dtype=torch.bfloat16)
    state = states(weight, torch.bfloat16)
    step(weight, torch.randn_like(weight), state, 1)
    before = [weight.clone(), *(value.clone() for value in state.values())]
    no = torch.zeros((), dtype=torch.bool, device="cuda")
    step(weight, torch.full_like(weight, torch.inf), state, 2, finite=no)
    for one, other in zip(before, [weight, *state.values()], strict=True):
        assert torch.equal(one, other)


def test_bf16_is_right_on_average() -> None:
    """The mean over many equal elements follows float64; nearest rounding would stand still."""
    weight = torch.full((1 << 20,), 1.0, device="cuda", dtype=torch.bfloat16)
    exact = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    peer = torch.optim.AdamW([exact], **GROUP)  # type: ignore[arg-type]
    state = states(weight, torch.bfloat16)
    for number in range(1, 201):
        gradient = 1.0 + 0.5 * (number % 3)
        exact.grad = torch.full_like(exact, gradient)
        peer.step()
        step(weight, torch.full_like(weight, gradient), state, number)
    assert weight.double().mean().item() == pytest.approx(exact.item(), rel=2e-3)
    square = peer.state[exact]["exp_avg_sq"].item()
    assert state["exp_avg_sq"].double().mean().item() == pytest.approx(square, rel=0.01)


@pytest.mark.parametrize("rows, columns", [(slice(8, 24), slice(0, 64)), (slice(0, 32), slice(16, 48))])
def test_a_shard_rounds_as_the_whole(rows: slice, columns: slice) -> None:
    torch.manual_seed(0)
    whole = torch.randn(32, 64, device="cuda").bfloat16()
    part = whole[rows, columns].contiguous()
    one, other = states(whole, torch.bfloat16), states(part, torch.bfloat16)
    place = {"offset": [rows.start, columns.start], "global_shape": [32, 64]}
    for number in range(1, 4):
        gradient = torch.randn(32, 64, device="cuda")
        step(whole, gradient, one, number)
        step(part, gradient[rows, columns].contiguous(), other, number, **place)
    assert torch.equal(whole[rows, columns], part)
    for key in adam_triton.STATES:
        assert torch.equal(one[key][rows, columns], other[key])
