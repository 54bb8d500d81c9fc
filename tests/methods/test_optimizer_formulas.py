"""collie-optimizers against their papers in numpy's float64, in every mode; states in bf16 and 8 bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from collie_core.config.schema import CollieConfig
from collie_core.data.batch import StepBatch
from collie_core.registry.options import validate_options
from collie_core.run import Run
from collie_core.shard import Piece, Shard
from collie_methods.optimizers import AdamW8bitPlugin, AdanPlugin, LionPlugin, MuonPlugin, SophiaGPlugin

Array = NDArray[np.float64]
Reference = Callable[[Array, list[Array], float, float], Array]
STEPS, LR, DECAY = 10, 0.02, 0.1
PLUGINS: dict[str, Any] = {
    "adamw8bit": AdamW8bitPlugin,
    "adan": AdanPlugin,
    "lion": LionPlugin,
    "muon": MuonPlugin,
    "sophiag": SophiaGPlugin,
}


def lion(p: Array, gradients: list[Array], lr: float, wd: float) -> Array:
    """arXiv 2302.06675, algorithm 2."""
    m = np.zeros_like(p)
    for g in gradients:
        p = p - lr * (np.sign(0.9 * m + 0.1 * g) + wd * p)
        m = 0.99 * m + 0.01 * g
    return p


def adan(p: Array, gradients: list[Array], lr: float, wd: float) -> Array:
    """arXiv 2208.06677, algorithm 1 (its betas are 0.02, 0.08, 0.01), means divided by 1 - (1 - beta)^k."""
    b1, b2, b3 = 0.02, 0.08, 0.01
    m, v, n, last = np.zeros_like(p), np.zeros_like(p), np.zeros_like(p), gradients[0]
    for k, g in enumerate(gradients, start=1):
        m = (1 - b1) * m + b1 * g
        v = (1 - b2) * v + b2 * (g - last)
        n = (1 - b3) * n + b3 * (g + (1 - b2) * (g - last)) ** 2
        mk, vk, nk = m / (1 - (1 - b1) ** k), v / (1 - (1 - b2) ** k), n / (1 - (1 - b3) ** k)
        p = (p - lr / (np.sqrt(nk) + 1e-8) * (mk + (1 - b2) * vk)) / (1 + lr * wd)
        last = g
    return p


def sophiag(p: Array, gradients: list[Array], lr: float, wd: float) -> Array:
    """arXiv 2305.14342, algorithm 3; every third step, 0.3 g stands for the gradient with drawn labels."""
    m, h = np.zeros_like(p), np.zeros_like(p)
    for t, g in enumerate(gradients):
        if t % 3 == 0:
            h = 0.99 * h + 0.01 * TOKENS * (0.3 * g) ** 2
        m = 0.96 * m + 0.04 * g
        p = p - lr * wd * p
        p = p - lr * np.clip(m / np.maximum(0.05 * h, 1e-12), -1, 1)
    return p


def adamw(p: Array, gradients: list[Array], lr: float, wd: float) -> Array:
    """arXiv 1711.05101, algorithm 2."""
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, g in enumerate(gradients, start=1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        p = p - lr * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8) + wd * p)
    return p


def muon(p: Array, gradients: list[Array], lr: float, wd: float) -> Array:
    """https://kellerjordan.github.io/posts/muon/, scaled as in arXiv 2502.16982, equation 4."""
    b = np.zeros_like(p)
    for g in gradients:
        b = 0.95 * b + 0.05 * g  # the same direction as the sum of the page
        x = 0.95 * b + 0.05 * g
        x = x / np.linalg.norm(x)
        x = x.T if p.shape[0] > p.shape[1] else x
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
        x = x.T if p.shape[0] > p.shape[1] else x
        p = p * (1 - lr * wd) - lr * 0.2 * np.sqrt(max(p.shape)) * x
    return p


TOKENS = 50
REFERENCES: dict[str, Reference] = {"adan": adan, "lion": lion, "sophiag": sophiag}


def optimizer_of(
    name: str, parameters: dict[str, nn.Parameter], shard: Shard | None = None, **options: Any
) -> Any:
    plugin = PLUGINS[name]
    section = {"name": name, "weight_decay": DECAY}
    run = Run(CollieConfig(model={"path": "unused"}, optimizer=section, seed=3), Path(), torch.device("cpu"))
    model = nn.Module()
    for key, parameter in parameters.items():
        owner = model
        *path, last = key.split(".")
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        owner.register_parameter(last, parameter)
    if shard is not None:
        run.shards = {shard.name: shard}
    made = plugin(validate_options(plugin, options))
    arguments = {"layout": SimpleNamespace(needs_norm=False)} if name != "muon" else {}
    return made.collie_optimizer(model=model, run=run, **arguments)


def take_step(optimizer: Any, number: int, gradients: dict[str, torch.Tensor], lr: float = LR) -> None:
    """As a layout does."""
    parameters = {name: p for group in optimizer.groups for name, p in group.parameters.items()}
    for name in optimizer.passes(StepBatch(number, 0, (), TOKENS, TOKENS)):
        if name != "update":  # SophiaG's own
            optimizer.begin_pass(name, lr, 1.0, 1.0)
            for key, gradient in gradients.items():
                optimizer.update(key, parameters[key], 0.3 * gradient, torch.tensor(True))
        elif optimizer.in_backward:
            optimizer.begin_pass(name, lr, 1.0, 1.0)
            for key, gradient in gradients.items():
                optimizer.update(key, parameters[key], gradient, torch.tensor(True))
        else:
            for key, gradient in gradients.items():
                parameters[key].grad = gradient.to(parameters[key].dtype)
            optimizer.step(lr)


def gradients_of(shape: tuple[int, ...], steps: int = STEPS) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    for number in range(steps):
        yield torch.randn(shape, generator=generator) * 10.0 ** (-(number % 3))


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("shape", [(), (7,), (12, 5), (3, 4, 2)])
@pytest.mark.parametrize("name", REFERENCES)
def test_ten_steps_equal_the_paper(name: str, shape: tuple[int, ...], in_backward: bool) -> None:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(shape))
    start, gradients = parameter.detach().double().numpy(), list(gradients_of(shape))
    options: dict[str, Any] = {"hessian_every": 3} if name == "sophiag" else {}
    optimizer = optimizer_of(name, {"w": parameter}, in_backward=in_backward, **options)
    for number, gradient in enumerate(gradients, start=1):
        take_step(optimizer, number, {"w": gradient})
    decay = DECAY if len(shape) > 1 else 0.0
    expected = REFERENCES[name](start, [g.double().numpy() for g in gradients], LR, decay)
    np.testing.assert_allclose(parameter.detach().double().numpy(), expected, rtol=3e-6, atol=2e-6)
    assert np.abs(expected - start).max() > LR


@pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
def test_muon_equals_its_page_as_far_as_its_bf16_goes(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    matrix, head = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(shape))
    start, gradients = matrix.detach().double().numpy(), list(gradients_of(shape))
    rest = head.detach().double().numpy()
    optimizer = optimizer_of("muon", {"blocks.0.weight": matrix, "head.weight": head})
    for number, gradient in enumerate(gradients, start=1):
        take_step(optimizer, number, {"blocks.0.weight": gradient, "head.weight": gradient})
    exact = [g.double().numpy() for g in gradients]
    expected = muon(start, exact, LR, DECAY)
    moved = np.abs(expected - start).max()
    np.testing.assert_allclose(matrix.detach().double().numpy(), expected, rtol=0, atol=0.03 * moved)
    expected = adamw(rest, exact, LR, DECAY)
    np.testing.assert_allclose(head.detach().double().numpy(), expected, rtol=3e-6, atol=2e-6)


def test_a_step_that_is_not_finite_changes_no_bit() -> None:
    for name in ("lion", "adan", "sophiag", "adamw8bit"):
        for dtype in (torch.float32, torch.bfloat16):
            parameter = nn.Parameter(torch.randn(8, 64).to(dtype))
            optimizer = optimizer_of(name, {"w": parameter}, in_backward=True)
            take_step(optimizer, 1, {"w": torch.randn(8, 64)})
            live = {"w": parameter.detach(), **optimizer.state_dict()}
            before = {key: value.clone() for key, value in live.items()}
            optimizer.passes(StepBatch(2, 0, (), TOKENS, TOKENS))
            optimizer.begin_pass("update", LR, 1.0, 1.0)
            optimizer.update("w", parameter, torch.full((8, 64), torch.nan), torch.tensor(False))
            assert all(torch.equal(value, before[key]) for key, value in live.items()), name


@pytest.mark.parametrize("name", ["lion", "adan", "sophiag", "adamw8bit"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_optimizer_goes_on_bit_for_bit(name: str, dtype: str) -> None:
    options: dict[str, Any] = {} if name == "adamw8bit" else {"state_dtype": dtype}
    gradients = list(gradients_of((4, 64), 8))

    def parameter() -> nn.Parameter:
        torch.manual_seed(0)
        return nn.Parameter(torch.randn(4, 64).to(getattr(torch, dtype)))

    def advance(optimizer: Any, steps: range) -> None:
        for number in steps:
            take_step(optimizer, number, {"w": gradients[number - 1]})

    straight, first, second = parameter(), parameter(), parameter()
    advance(optimizer_of(name, {"w": straight}, **options), range(1, 9))
    optimizer = optimizer_of(name, {"w": first}, **options)
    advance(optimizer, range(1, 5))
    other = optimizer_of(name, {"w": second}, **options)
    second.data.copy_(first.data)
    other.load_state_dict({key: value.clone() for key, value in optimizer.state_dict().items()})
    advance(other, range(5, 9))
    assert torch.equal(straight, second)


@pytest.mark.parametrize(
    "name, key, options, within",
    [
        ("adan", "exp_avg_sq", {"state_dtype": "bfloat16"}, 0.02),
        ("adamw8bit", "exp_avg_sq", {}, 0.02),
    ],
)
def test_states_of_less_precision_keep_up_with_fp32(
    name: str, key: str, options: dict[str, Any], within: float
) -> None:
    """2,000 steps, the gradients of which shrink 30-fold: rounded to nearest, means would stand still."""
    shape, steps = (8, 256), 2000

    def mean(**options: Any) -> float:
        parameter = nn.Parameter(torch.ones(shape))
        optimizer = optimizer_of(name, {"w": parameter}, **options)
        generator = torch.Generator().manual_seed(0)
        for number in range(1, steps + 1):
            scale = 1.0 if number < 200 else 0.03
            take_step(optimizer, number, {"w": (0.5 + torch.randn(shape, generator=generator)) * scale}, 1e-5)
        return float(optimizer.stores["w"][key].read().mean())

    if name == "adamw8bit":
        second = torch.zeros(shape)
        generator = torch.Generator().manual_seed(0)
        for number in range(1, steps + 1):
            gradient = (0.5 + torch.randn(shape, generator=generator)) * (1.0 if number < 200 else 0.03)
            second = 0.999 * second + 0.001 * gradient**2
        expected = float(second.mean())
    else:
        expected = mean(**{k: v for k, v in options.items() if k != "state_dtype"})
    assert mean(**options) == pytest.approx(expected, rel=within)


@pytest.mark.parametrize("name", ["lion", "adan", "sophiag", "adamw8bit"])
def test_a_box_of_rows_holds_what_the_whole_holds_there(name: str) -> None:
    """bf16 weights, and states of less precision: the noise is that of the place in the whole."""
    options: dict[str, Any] = {} if name == "adamw8bit" else {"state_dtype": "bfloat16"}
    torch.manual_seed(0)
    start, rows = torch.randn(6, 128).bfloat16(), slice(2, 5)
    whole, box = nn.Parameter(start.clone()), nn.Parameter(start[rows].clone())
    shard = Shard("w", box, (6, 128), (2, 0))
    one, other = optimizer_of(name, {"w": whole}, **options), optimizer_of(name, {"w": box}, shard, **options)
    for number, gradient in enumerate(gradients_of((6, 128), 4), start=1):
        take_step(one, number, {"w": gradient})
        take_step(other, number, {"w": gradient[rows]})
    assert torch.equal(whole[rows], box)
    pieces = other.state_dict()
    for key, value in one.state_dict().items():
        piece = pieces[key]
        if isinstance(piece, Piece):
            assert piece.shape == tuple(value.shape)
            assert torch.equal(value[piece.slices], piece.local), key
        else:
            assert key == "w.t" and torch.equal(value, piece)
