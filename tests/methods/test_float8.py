"""collie-float8: values against their formulas, training with every kind of optimizer, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_runs import lora_config
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from training_helpers import config, largest_difference, losses, metrics, weights

from collie_core import AutoModelForCausalLM, CollieConfig, Trainer
from collie_core.errors import UserError
from collie_core.plugin import AdaptedLinear, Run, adapted_linear, block_linears, hookimpl
from collie_methods.float8.product import Float8Product

RECIPES = ["tensorwise", "rowwise"]
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def float8(**options: Any) -> dict[str, Any]:
    return {"name": "float8", "emulate": True, **options}


def rounded(t: Tensor, kind: torch.dtype, recipe: str, dim: int) -> Tensor:
    """float8(s t) / s in fp32; dim: the one over which the product sums."""
    largest = t.abs().max() if recipe == "tensorwise" else t.abs().amax(dim, keepdim=True)
    scale = (torch.finfo(kind).max / largest.double()).float()
    if recipe == "rowwise":
        scale = 2.0 ** scale.log2().floor()
    return (t.float() * scale).to(kind).float() / scale


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_product_and_its_gradients_are_those_of_the_formulas(recipe: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, 32, generator=generator)
    weight = torch.randn(48, 32, generator=generator) * 0.1
    gradient = torch.randn(2, 9, 48, generator=generator) * 1e-3
    x[1, 3] *= 100.0  # an outlier, which a scale for the whole tensor pays for
    out_kind = E5M2 if recipe == "tensorwise" else E4M3
    rows, g = x.flatten(0, 1), gradient.flatten(0, 1)
    expected = rounded(rows, E4M3, recipe, 1) @ rounded(weight, E4M3, recipe, 1).T
    to_x = rounded(g, out_kind, recipe, 1) @ rounded(weight, E4M3, recipe, 0)
    to_weight = rounded(g, out_kind, recipe, 0).T @ rounded(rows, E4M3, recipe, 0)
    x.requires_grad_()
    weight.requires_grad_()
    out = Float8Product(recipe, emulate=True)(x, weight)
    out.backward(gradient)
    assert x.grad is not None and weight.grad is not None
    torch.testing.assert_close(out.detach().flatten(0, 1), expected)
    torch.testing.assert_close(x.grad.flatten(0, 1), to_x)
    torch.testing.assert_close(weight.grad, to_weight)
    far = (out.detach() - x.detach() @ weight.detach().T).abs().max() / out.detach().abs().max()
    assert 1e-4 < far < 0.06


def test_a_frozen_weight_has_no_gradient_and_bf16_stays_bf16() -> None:
    x = torch.randn(16, 32, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(16, 32, dtype=torch.bfloat16)
    out = Float8Product("tensorwise", emulate=True)(x, weight)
    out.sum().backward()
    assert out.dtype == torch.bfloat16 and x.grad is not None and x.grad.dtype == torch.bfloat16
    assert weight.grad is None


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_compiled_block_is_one_graph_and_gives_the_same(recipe: str) -> None:
    linear = AdaptedLinear(32, 32)
    linear.weight = torch.nn.Parameter(torch.randn(32, 32) * 0.1)
    linear.multiply = Float8Product(recipe, emulate=True)
    found: list[tuple[Tensor, Tensor]] = []
    for run in (linear, torch.compile(linear, fullgraph=True, backend="aot_eager")):
        linear.weight.grad = None
        x = torch.linspace(-1.0, 1.0, 20 * 32).view(20, 32).requires_grad_()
        run(x).pow(2).sum().backward()
        assert x.grad is not None and linear.weight.grad is not None
        found.append((x.grad, linear.weight.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_all_compiled_blocks_share_one_graph(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    multiply = Float8Product("tensorwise", emulate=True)
    for path in block_linears(model):
        adapted_linear(model, path).multiply = multiply
    counter = CompileCounterWithBackend("aot_eager")
    for block in model.blocks.values():
        block.compile(backend=counter, fullgraph=True)
    ids = torch.arange(4, 36).view(2, 16)
    model.train()(ids, labels=ids).loss.backward()
    assert counter.frame_count == 1


class Watcher:
    """What the linears are while the model trains, and the parameters of the run."""

    def __init__(self) -> None:
        self.changed: set[str] = set()
        self.names: dict[str, tuple[int, ...]] = {}

    @hookimpl
    def collie_model_loaded(self, model: torch.nn.Module) -> None:
        modules = model.named_modules()
        self.changed = {path for path, module in modules if getattr(module, "multiply", None) is not None}
        self.names = {name: tuple(p.shape) for name, p in model.named_parameters()}


def trained(model: Path, data: Path, out: Path, /, *watchers: object, **changes: Any) -> CollieConfig:
    made = config(
        model, data, out, **{"train": {"micro_batch_size": 4, "max_steps": 6}, **changes}
    )
    Trainer(made, callbacks=watchers).train()
    return made


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    "optimizer",
    [
        {"name": "lomo", "lr": 0.1, "clip_grad_norm": 1.0},
        {"name": "adalomo", "lr": 1e-2},
        {"name": "adamw", "lr": 1e-2},
    ],
    ids=lambda section: section["name"],
)
def test_full_training_is_near_that_without(
    optimizer: dict[str, Any], recipe: str, tiny_llama: Path, data_file: Path, tmp_path: Path
) -> None:
    watcher, plain = Watcher(), Watcher()
    section = float8(recipe=recipe)
    trained(tiny_llama, data_file, tmp_path / "f8", watcher, optimizer=optimizer, plugins=[section])
    trained(tiny_llama, data_file, tmp_path / "hp", plain, optimizer=optimizer)
    assert watcher.names == plain.names
    kinds = [f"attention.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    assert watcher.changed == {f"blocks.{block}.{kind}" for block in range(2) for kind in kinds}
    ours, theirs = losses(tmp_path / "f8"), losses(tmp_path / "hp")
    assert ours != theirs and ours == pytest.approx(theirs, rel=0.01)
    assert ours[-1] < ours[0]
    exported, other = weights(tmp_path / "f8"), weights(tmp_path / "hp")
    assert exported.keys() == other.keys()
    assert all(exported[name].dtype == torch.float32 for name in exported)
    resolved = json.loads((tmp_path / "f8/run.json").read_text())["resolved"]["float8"]
    assert resolved == {"recipe": recipe, "emulated": True, "linears": 14}


def test_recompute_changes_nothing(tiny_llama: Path, data_file: Path, tmp_path: Path) -> None:
    how: dict[str, dict[str, Any]] = {
        "none": {},
        "full": {"activation_checkpointing": "full"},
        "selective": {"activation_checkpointing": "selective"},
    }
    for name, train in how.items():
        trained(
            tiny_llama,
            data_file,
            tmp_path / name,
            optimizer={"name": "lomo", "lr": 0.1},
            plugins=[float8(skip_modules=["blocks.1.*"])],
            train={"micro_batch_size": 4, "max_steps": 3, **train},
        )
    for name in ("full", "selective"):
        assert losses(tmp_path / name) == losses(tmp_path / "none"), name
        assert largest_difference(weights(tmp_path / name), weights(tmp_path / "none")) == 0.0, name


def test_lora_trains_its_own_matrices_on_a_float8_base(
    tiny_llama: Path, data_file: Path, tmp_path: Path
) -> None:
    runs = {"hp": [], "f8": [float8(recipe="rowwise")]}
    for name, plugins in runs.items():
        Trainer(lora_config(tiny_llama, data_file, tmp_path / name, plugins=plugins)).train()
    ours, theirs = losses(tmp_path / "f8"), losses(tmp_path / "hp")
    assert ours != theirs and ours == pytest.approx(theirs, rel=0.01)
    assert weights(tmp_path / "f8").keys() == weights(tmp_path / "hp").keys()


def test_evaluation_is_that_of_the_weights_as_they_are(
    tiny_llama: Path, data_file: Path, tmp_path: Path
) -> None:
    data = {"train": str(data_file), "eval": str(data_file), "max_length": 64}
    made = config(
        tiny_llama, data_file, tmp_path / "run", data=data, plugins=[float8()], train={"max_steps": 2}
    )
    result = Trainer(made).train()
    assert result.model is not None
    plain = config(result.model, data_file, tmp_path / "none", data=data)
    assert Trainer(plain).evaluate() == pytest.approx(result.evaluation, abs=1e-6)
    # an evaluation needs no device with float8
    section = {**plain.to_mapping(), "plugins": [{"name": "float8"}]}
    assert Trainer(CollieConfig(**section)).evaluate() == pytest.approx(result.evaluation, abs=1e-6)


def test_a_given_model_computes_as_before_when_the_run_is_over(
    tiny_llama: Path, data_file: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    made = config(
        tiny_llama, data_file, tmp_path / "run", plugins=[float8()], train={"max_steps": 2}
    )
    Trainer(made, model=model).train()
    assert losses(tmp_path / "run")[0] != 0.0
    assert not any(getattr(module, "multiply", None) for module in model.modules())
    ids = torch.arange(4, 20)[None]
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    with torch.no_grad():
        assert torch.equal(model.train()(ids).logits, exported(ids).logits)


def test_a_run_goes_on_as_if_it_had_not_stopped(tiny_llama: Path, data_file: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"plugins": [float8()], "optimizer": {"name": "adalomo", "lr": 1e-2}}
    train = {"micro_batch_size": 4}
    trained(tiny_llama, data_file, tmp_path / "whole", **how, train={**train, "max_steps": 4})
    for steps in (2, 4):
        trained(tiny_llama, data_file, tmp_path / "parts", **how, train={**train, "max_steps": steps})
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert [line["step"] for line in metrics(tmp_path / "parts")] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"plugins": [{"name": "float8"}]}, ["needs a CUDA device", "cpu"]),
        ({"plugins": [float8(skip_modules=["o_prj"])]}, ["'o_prj' fits no linear", "o_proj"]),
        ({"plugins": [float8(skip_modules=["blocks.*"])]}, ["have no linear"]),
        ({"plugins": [float8(), float8()]}, ["more than once"]),
        ({"plugins": [float8(), float8(name="collie-float8:float8")]}, ["more than once"]),
        ({"plugins": [float8(recipe="blockwise")]}, ["recipe", "blockwise"]),
        ({"plugins": [float8()], "layout": "deepspeed"}, ["layout deepspeed", "zero_stage: 3"]),
        ({"plugins": [float8()], "layout": "collie-deepspeed:deepspeed"}, ["layout deepspeed"]),
        (
            {"plugins": [float8()], "adapters": [{"name": "nf4", "block_size": 32}, {"name": "lora"}]},
            ["adapter nf4", "keep one"],
        ),
    ],
    ids=["cpu", "unknown", "none", "twice", "twice named", "recipe", "deepspeed", "named deepspeed", "nf4"],
)
def test_refusals(
    changes: dict[str, Any], words: list[str], tiny_llama: Path, data_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        Trainer(config(tiny_llama, data_file, tmp_path / "run", **changes)).train()
    assert all(word in str(caught.value) for word in words), caught.value
    assert not (tmp_path / "run").exists()


def test_sizes_that_float8_cannot_multiply_are_refused_by_name(
    make_llama: Any, data_file: Path, tmp_path: Path
) -> None:
    model = make_llama(num_hidden_layers=1, intermediate_size=56)
    with pytest.raises(UserError) as caught:
        Trainer(config(model, data_file, tmp_path / "run", plugins=[float8()])).train()
    text = str(caught.value)
    assert "multiples of 16" in text and "blocks.0.mlp.up_proj (32 to 56)" in text and "q_proj" not in text
    assert not (tmp_path / "run").exists()
    trained(model, data_file, tmp_path / "run", plugins=[float8(skip_modules=["blocks.*.mlp.*"])])
    assert len(losses(tmp_path / "run")) == 6


class Thief:
    """A plugin that changes what it may not."""

    def __init__(self, what: str) -> None:
        self.what = what

    @hookimpl
    def collie_model_built(self, run: Run, model: Any) -> None:
        weight = model.blocks["0"].mlp.up_proj.weight
        if self.what == "shape":
            model.blocks["0"].mlp.up_proj.weight = torch.nn.Parameter(weight[:3])
        elif self.what == "frozen":
            weight.requires_grad_(False)
        elif self.what == "error":
            raise UserError("not today")
        else:
            del model.blocks["0"].mlp.up_proj.weight


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("shape", "blocks.0.mlp.up_proj.weight was [64, 32] float32 trained and is [3, 32] float32 trained"),
        ("frozen", "is [64, 32] float32 frozen"),
        ("absent", "and is absent"),
        ("error", "not today"),
    ],
)
def test_a_plugin_may_change_no_parameter(
    what: str, words: str, tiny_llama: Path, data_file: Path, tmp_path: Path
) -> None:
    made = config(tiny_llama, data_file, tmp_path / "run")
    with pytest.raises(UserError) as caught:
        Trainer(made, callbacks=[Thief(what)]).train()
    assert words in str(caught.value)
    assert not (tmp_path / "run").exists()
