"""LOMO and AdaLomo against their published formulas in float64, for every rank and dtype."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from collie_core.run import ParameterGroup
from collie_methods.lomo.optimizer import AdaLomoOptimizer, FusedOptimizer, LomoOptimizer

Array = NDArray[np.float64]
SHAPES = [(), (1,), (37,), (1, 1), (8, 13), (13, 1), (3, 4, 5), (2, 3, 2, 3)]
STEPS = 6
TRUE = torch.tensor(True)


def made(kind: type[FusedOptimizer], parameters: dict[str, nn.Parameter], **options: Any) -> Any:
    decay, scale = options.pop("weight_decay", 0.0), options.pop("lr_scale", 1.0)
    return kind([ParameterGroup(parameters, scale, decay)], **options)


def take_steps(
    optimizer: Any,
    parameter: nn.Parameter,
    gradients: list[Tensor],
    lr: float,
    loss_scale: float = 1.0,
    grad_scale: float | Tensor = 1.0,
) -> None:
    for number, gradient in enumerate(gradients, start=1):
        optimizer.step_number = number
        optimizer.begin_pass("update", lr, loss_scale, grad_scale)
        optimizer.update("w", parameter, gradient, TRUE)
        optimizer.end_pass("update")


def lomo_reference(p: Array, gradients: list[Array], lr: float, wd: float, v: float | None) -> Array:
    for g in gradients:
        g = g if v is None else np.clip(g, -v, v)
        p = p * (1 - lr * wd)
        p = p - lr * g
    return p


def adalomo_reference(p: Array, gradients: list[Array], lr: float, wd: float) -> Array:
    """Written from the paper; matrices of a batch one by one, but for the root mean squares."""
    batch = p.shape[:-2]
    rows, cols = np.zeros(p.shape[:-1]), np.zeros((*batch, *p.shape[-1:]))
    vector = np.zeros(p.shape)
    for t, g in enumerate(gradients, start=1):
        beta = 1 - t**-0.8
        u = g**2 + 1e-30
        update = np.zeros(p.shape)
        if p.ndim < 2:
            vector = beta * vector + (1 - beta) * u
            update = g / np.sqrt(vector)
        else:
            for i in np.ndindex(*batch):
                rows[i] = beta * rows[i] + (1 - beta) * u[i].mean(axis=1)
                cols[i] = beta * cols[i] + (1 - beta) * u[i].mean(axis=0)
                update[i] = g[i] / np.sqrt(np.outer(rows[i] / rows[i].mean(), cols[i]))
        update = update / max(1.0, np.sqrt((update**2).mean()))
        a = lr * max(1e-3, np.sqrt((p**2).mean()))
        p = p * (1 - a * wd) - a * update
    return p


def start(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[nn.Parameter, list[Tensor]]:
    torch.manual_seed(len(shape))
    parameter = nn.Parameter(torch.randn(shape).to(dtype))
    return parameter, [(torch.randn(shape) * 10.0 ** (1 - n)).to(dtype) for n in range(STEPS)]


def array(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("wd, v", [(0.0, None), (0.3, None), (0.1, 0.5)])
def test_lomo(shape: tuple[int, ...], wd: float, v: float | None) -> None:
    parameter, gradients = start(shape)
    expected = lomo_reference(array(parameter), [array(g) for g in gradients], 0.05, wd, v)
    optimizer = made(LomoOptimizer, {"w": parameter}, weight_decay=wd, clip_grad_value=v)
    take_steps(optimizer, parameter, gradients, 0.05)
    np.testing.assert_allclose(array(parameter), expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("wd", [0.0, 0.3])
def test_adalomo(shape: tuple[int, ...], wd: float) -> None:
    parameter, gradients = start(shape)
    expected = adalomo_reference(array(parameter), [array(g) for g in gradients], 0.05, wd)
    optimizer = made(AdaLomoOptimizer, {"w": parameter}, weight_decay=wd)
    take_steps(optimizer, parameter, gradients, 0.05)
    np.testing.assert_allclose(array(parameter), expected, rtol=2e-6, atol=1e-6)


def test_adalomo_with_zero_gradients_and_zero_parameters() -> None:
    for shape in [(5,), (4, 6)]:
        parameter = nn.Parameter(torch.zeros(shape))
        gradients = [torch.zeros(shape), torch.ones(shape), torch.zeros(shape)]
        expected = adalomo_reference(array(parameter), [array(g) for g in gradients], 0.1, 0.0)
        take_steps(made(AdaLomoOptimizer, {"w": parameter}), parameter, gradients, 0.1)
        np.testing.assert_allclose(array(parameter), expected, rtol=1e-5)
        assert float(parameter.detach().abs().max()) > 0


@pytest.mark.parametrize("kind", [LomoOptimizer, AdaLomoOptimizer])
def test_scales_and_clipping_come_before_the_formula(kind: type[FusedOptimizer]) -> None:
    """(gradient / S, clamped, times the clip factor) as given equals the same computed before."""
    parameter, gradients = start((6, 7))
    other = nn.Parameter(parameter.detach().clone())
    take_steps(
        made(kind, {"w": parameter}, clip_grad_value=0.7),
        parameter,
        [g * 1024 for g in gradients],
        0.02,
        loss_scale=1024.0,
        grad_scale=torch.tensor(0.25),
    )
    take_steps(made(kind, {"w": other}), other, [g.clamp(-0.7, 0.7) * 0.25 for g in gradients], 0.02)
    assert torch.equal(parameter, other)


@pytest.mark.parametrize("kind", [LomoOptimizer, AdaLomoOptimizer])
def test_the_rate_of_a_group(kind: type[FusedOptimizer]) -> None:
    parameter, gradients = start((6, 7))
    other = nn.Parameter(parameter.detach().clone())
    take_steps(made(kind, {"w": parameter}, lr_scale=0.5), parameter, gradients, 0.02)
    take_steps(made(kind, {"w": other}), other, gradients, 0.01)
    assert torch.equal(parameter, other)


@pytest.mark.parametrize("kind", [LomoOptimizer, AdaLomoOptimizer])
def test_lower_precision_is_fp32_arithmetic_rounded_once(kind: type[FusedOptimizer]) -> None:
    for dtype, tolerance in ((torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-7)):
        parameter, gradients = start((6, 7), dtype)
        exact = nn.Parameter(parameter.detach().float())
        take_steps(made(kind, {"w": parameter}, weight_decay=0.1), parameter, gradients[:1], 0.02)
        take_steps(made(kind, {"w": exact}, weight_decay=0.1), exact, [gradients[0].float()], 0.02)
        assert parameter.dtype == dtype
        relative = (parameter.detach().float() - exact.detach()).abs() / exact.detach().abs()
        assert 0 < float(relative.max()) <= tolerance


@pytest.mark.parametrize("kind", [LomoOptimizer, AdaLomoOptimizer])
def test_bfloat16_moves_on_average_as_fp32(kind: type[FusedOptimizer]) -> None:
    """300 updates, each far below half of the last bit of a bf16 weight near 1."""
    shape, lr = (64, 128), 1e-4
    low = nn.Parameter(torch.ones(shape, dtype=torch.bfloat16))
    exact = nn.Parameter(torch.ones(shape))
    generator = torch.Generator().manual_seed(0)
    gradients = [(1 + 0.5 * torch.randn(shape, generator=generator)).bfloat16().float() for _ in range(300)]
    take_steps(made(kind, {"w": low}), low, [g.bfloat16() for g in gradients], lr)
    take_steps(made(kind, {"w": exact}), exact, gradients, lr)
    moved = float(exact.detach().mean()) - 1
    assert abs(moved) > 0.02
    assert float(low.detach().float().mean()) - 1 == pytest.approx(moved, rel=0.02)


@pytest.mark.parametrize("kind", [LomoOptimizer, AdaLomoOptimizer])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (5,), (4, 6)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_no_bit(
    kind: type[FusedOptimizer], dtype: torch.dtype, shape: tuple[int, ...], bad: float
) -> None:
    parameter, gradients = start(shape, dtype)
    with torch.no_grad():
        parameter.view(-1)[0] = -0.0
    optimizer = made(kind, {"w": parameter}, weight_decay=0.1)
    clean = nn.Parameter(parameter.detach().clone())
    straight = made(kind, {"w": clean}, weight_decay=0.1)

    def bits() -> list[Tensor]:
        return [
            t.detach().clone().view(-1).view(torch.uint8)
            for t in [parameter, *optimizer.state_dict().values()]
        ]

    for number, gradient in enumerate(gradients[:4], start=1):
        optimizer.step_number = straight.step_number = number
        optimizer.begin_pass("update", 0.02, 1.0, torch.tensor(bad))
        before = bits()
        optimizer.update("w", parameter, torch.full_like(gradient, bad), torch.tensor(False))
        assert all(torch.equal(one, other) for one, other in zip(bits(), before, strict=True))
        for each, target in ((optimizer, parameter), (straight, clean)):
            each.begin_pass("update", 0.02, 1.0, 1.0)
            each.update("w", target, gradient, TRUE)
    assert torch.equal(parameter, clean)  # the count of steps stood still too
    for name, tensor in straight.state_dict().items():
        assert torch.equal(optimizer.state_dict()[name], tensor)


@pytest.mark.parametrize("kind", [LomoOptimizer, AdaLomoOptimizer])
@pytest.mark.parametrize("shape", [(5,), (4, 6)])
def test_the_gradient_is_not_written_to(kind: type[FusedOptimizer], shape: tuple[int, ...]) -> None:
    parameter, [gradient, *_] = start(shape)
    before = gradient.clone()
    take_steps(made(kind, {"w": parameter}), parameter, [gradient], 0.1)
    assert torch.equal(gradient, before)


def test_replicas_and_tied_copies_stay_bit_equal() -> None:
    for kind in (LomoOptimizer, AdaLomoOptimizer):
        one, gradients = start((8, 13), torch.bfloat16)
        other = nn.Parameter(one.detach().clone())
        torch.manual_seed(1)
        take_steps(made(kind, {"w": one}, seed=3), one, gradients, 0.01)
        torch.manual_seed(2)  # another rank's generator
        take_steps(made(kind, {"w": other}, seed=3), other, gradients, 0.01)
        assert torch.equal(one, other)
        another = nn.Parameter(start((8, 13), torch.bfloat16)[0].detach())
        take_steps(made(kind, {"w": another}, seed=4), another, gradients, 0.01)
        assert not torch.equal(one, another)


def test_adalomo_keeps_rows_and_columns_only() -> None:
    parameters = {
        "matrix": nn.Parameter(torch.zeros(64, 48)),
        "batch": nn.Parameter(torch.zeros(3, 8, 5)),
        "vector": nn.Parameter(torch.zeros(7)),
        "number": nn.Parameter(torch.zeros(())),
    }
    state = made(AdaLomoOptimizer, parameters).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "matrix.row": (64,),
        "matrix.col": (48,),
        "matrix.t": (),
        "batch.row": (3, 8),
        "batch.col": (3, 5),
        "batch.t": (),
        "vector.v": (7,),
        "vector.t": (),
        "number.v": (),
        "number.t": (),
    }
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert made(LomoOptimizer, parameters).state_dict() == {}
