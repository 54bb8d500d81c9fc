"""float8 on a device that has it: its products, compiled blocks, memory, and what training comes to."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import Tensor
from training_helpers import config, losses, weights

from collie_core import Trainer
from collie_core.plugin import AdaptedLinear, Run, hookimpl
from collie_methods.float8.product import Float8Product

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
    reason="needs a CUDA device with float8",
)
RECIPES = ["tensorwise", "rowwise"]


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    """Many graphs of one function in one process would make torch give up compiling it."""
    torch.compiler.reset()


def drawn(*shape: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(len(shape) + shape[-1])
    return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16) * scale


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_products_are_those_of_the_emulation(recipe: str, dtype: torch.dtype) -> None:
    found = []
    for emulate in (False, True):
        x = drawn(2, 75, 256).to(dtype).requires_grad_()  # 150 rows: no multiple of 16
        weight = drawn(512, 256, scale=0.02).to(dtype).requires_grad_()
        out = Float8Product(recipe, emulate)(x, weight)
        out.backward(drawn(2, 75, 512, scale=1e-3).to(dtype))
        assert x.grad is not None and weight.grad is not None
        found.append((out.detach(), x.grad, weight.grad))
    for own, emulated in zip(*found, strict=True):
        assert own.dtype == emulated.dtype == dtype
        # tensor cores sum in fewer bits than fp32, and rowwise gives bf16 at most
        assert float((own - emulated).abs().max() / emulated.abs().max()) < 0.01


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_a_compiled_linear_is_one_graph_and_keeps_no_more_than_bf16_does(recipe: str, frozen: bool) -> None:
    kept: dict[str, int] = {}
    gradients: dict[str, Tensor] = {}
    for name in ("bf16", "float8"):
        linear = AdaptedLinear(1024, 4096)
        linear.weight = torch.nn.Parameter(drawn(4096, 1024, scale=0.02), requires_grad=not frozen)
        linear.multiply = Float8Product(recipe, False) if name == "float8" else None
        x = drawn(8192, 1024).requires_grad_()

        def two(x: Tensor, linear: AdaptedLinear = linear) -> Tensor:
            return torch.nn.functional.silu(linear(x * 2.0))

        run = torch.compile(two, fullgraph=True)
        run(x).sum().backward()  # compiled, and workspaces taken
        x.grad = linear.weight.grad = None
        before = torch.cuda.memory_allocated()
        out = run(x)
        kept[name] = torch.cuda.memory_allocated() - before
        out.sum().backward()
        assert x.grad is not None
        gradients[name] = x.grad
        assert (linear.weight.grad is None) == frozen
    assert kept["float8"] <= kept["bf16"] + 5 * 2**20, kept  # scales, and at most the weight in float8
    far = (gradients["float8"] - gradients["bf16"]).abs().max() / gradients["bf16"].abs().max()
    assert 0 < float(far) < 0.1


class Peak:
    """Peak memory of the steps, bytes."""

    def __init__(self) -> None:
        self.bytes = 0

    @hookimpl
    def collie_step_start(self, run: Run, step: int) -> None:
        if step == 4:
            torch.cuda.reset_peak_memory_stats()

    @hookimpl
    def collie_step_end(self, run: Run, step: int) -> None:
        self.bytes = torch.cuda.max_memory_allocated()


@pytest.fixture(scope="module")
def llama(make_llama: Callable[..., Path]) -> Path:
    return make_llama(
        hidden_size=256, intermediate_size=704, num_attention_heads=4, num_key_value_heads=4
    )


@pytest.fixture(scope="module")
def texts() -> list[dict[str, str]]:
    """Sources of the standard library, in pieces of 800 characters."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = "".join(path.read_text(encoding="utf-8", errors="ignore") for path in paths)[:4_000_000]
    return [{"text": text[begin : begin + 800]} for begin in range(0, len(text), 800)]


def train(
    model: Path, texts: list[dict[str, str]], out: Path, steps: int, /, **changes: Any
) -> tuple[list[float], int]:
    peak = Peak()
    changes["train"] = {"micro_batch_size": 16, "max_steps": steps, **changes.get("train", {})}
    made = config(
        model,
        out / "none.jsonl",
        out,
        **{"model": {"dtype": "bfloat16"}, "data": {"max_length": 256, "packing": True}, **changes},
    )
    Trainer(made, train_dataset=texts, callbacks=[peak]).train()
    return losses(out), peak.bytes


METHODS: dict[str, dict[str, Any]] = {
    "lomo": {"optimizer": {"name": "lomo", "lr": 0.05, "clip_grad_norm": 1.0}},
    "adamw": {"optimizer": {"name": "adamw", "lr": 1e-3}},
    "lora": {"optimizer": {"name": "adamw", "lr": 1e-3}, "adapters": [{"name": "lora", "r": 8}]},
}


@pytest.fixture(scope="module")
def in_bf16(
    llama: Path, texts: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The folder of 200 steps of a method in bf16, run once."""
    done: dict[str, Path] = {}

    def run(method: str) -> Path:
        if method not in done:
            done[method] = tmp_path_factory.mktemp(method) / "run"
            train(llama, texts, done[method], 200, **METHODS[method])
        return done[method]

    return run


@pytest.mark.parametrize(
    ("method", "recipe"),
    [("lomo", "tensorwise"), ("lomo", "rowwise"), ("adamw", "tensorwise"), ("lora", "tensorwise")],
)
def test_the_loss_is_within_one_per_cent_of_that_in_bf16(
    method: str,
    recipe: str,
    in_bf16: Callable[[str], Path],
    llama: Path,
    texts: list[dict[str, str]],
    tmp_path: Path,
) -> None:
    plain = losses(in_bf16(method))
    section = {"name": "float8", "recipe": recipe}
    ours, _ = train(llama, texts, tmp_path / "float8", 200, **METHODS[method], plugins=[section])
    means = [(fmean(ours[k : k + 20]), fmean(plain[k : k + 20])) for k in range(0, 200, 20)]
    print(method, recipe, [f"{one:.4f}/{other:.4f}" for one, other in means])
    assert ours[0] != plain[0] and (method == "lora" or plain[-1] < 0.9 * plain[0])
    assert abs(fmean(ours) / fmean(plain) - 1.0) < 0.01
    assert all(abs(one / other - 1.0) < 0.02 for one, other in means), means
    exported, expected = weights(tmp_path / "float8"), weights(in_bf16(method))
    assert {k: (v.shape, v.dtype) for k, v in exported.items()} == {
        k: (v.shape, v.dtype) for k, v in expected.items()
    }


@pytest.mark.parametrize("how", ["full", "eager"])
def test_recompute_and_compilation_change_little(
    how: str, llama: Path, texts: list[dict[str, str]], tmp_path: Path
) -> None:
    changes: dict[str, dict[str, Any]] = {
        "full": {"activation_checkpointing": "full"},
        "eager": {"compile": False},
    }
    section = {**METHODS["lomo"], "plugins": [{"name": "float8"}]}
    base: dict[str, Any] = {"activation_checkpointing": "none"}
    plain, most = train(llama, texts, tmp_path / "one", 12, **section, train=base)
    found, least = train(llama, texts, tmp_path / "other", 12, **section, train={**base, **changes[how]})
    assert found == pytest.approx(plain, rel=5e-3)
    assert how == "eager" or least < most
