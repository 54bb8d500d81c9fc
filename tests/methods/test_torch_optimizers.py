"""torch's optimizers as plugins: bitwise torch in fp32, fp32 arithmetic for lower precision, exact resume."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from collie_core.cli.main import main
from collie_core.config.problems import ConfigProblems
from collie_core.config.schema import CollieConfig
from collie_core.errors import CheckpointError
from collie_core.optimizers import torch_optimizers
from collie_core.optimizers.torch_optimizers import TorchOptimizerPlugin
from collie_core.registry.options import validate_options
from collie_core.run import Run

PLUGINS: dict[str, type[TorchOptimizerPlugin]] = {
    cls.__name__: cls for cls in TorchOptimizerPlugin.__subclasses__()
}
OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9, "nesterov": True},
    "AdamW": {"betas": [0.9, 0.95], "amsgrad": True},
    "RMSprop": {"momentum": 0.5, "centered": True},
    "Adagrad": {"initial_accumulator_value": 0.1},
    "ASGD": {"t0": 1.0},
}
NAMES = sorted(PLUGINS)
OURS = {"in_backward", "clip_mode", "state_dtype"}
#: what the plugins ask of a layout
PLACE: Any = SimpleNamespace(needs_norm=False)


def run_of(tmp_path: Path, name: str, **section: Any) -> Run:
    config = CollieConfig(model={"path": "unused"}, optimizer={"name": name.lower(), **section}, seed=3)
    return Run(config, tmp_path, torch.device("cpu"))


def plugin_of(name: str, **options: Any) -> TorchOptimizerPlugin:
    cls = PLUGINS[name]
    return cls(validate_options(cls, options))


def model_of(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)).to(dtype)


def set_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)


def advance(optimizer: Any, run: Run, model: nn.Module, lrs: list[float]) -> None:
    for lr in lrs:
        set_gradients(model, run.step + 1)
        optimizer.step(lr)
        run.step += 1


def equal(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_every_optimizer_of_torch_that_fits_is_offered() -> None:
    left_out = {"Optimizer", "LBFGS", "SparseAdam", "Muon"}  # several passes, sparse, matrices alone
    offered = {name for name, value in vars(torch.optim).items() if inspect.isclass(value)} - left_out
    assert set(PLUGINS) == offered


@pytest.mark.parametrize("name", NAMES)
def test_options_are_those_of_the_constructor(name: str) -> None:
    plugin = plugin_of(name)
    defaults = {
        key: parameter.default
        for key, parameter in inspect.signature(plugin.torch_class).parameters.items()
        if key not in ("params", "lr", "weight_decay", "foreach", "capturable", "differentiable", "fused")
    }
    assert plugin.constructor_options == defaults
    assert dataclasses.asdict(plugin.options).keys() - defaults.keys() <= OURS
    assert plugin.default_lr > 0


def test_options_are_checked(tmp_path: Path) -> None:
    adamw = PLUGINS["AdamW"]
    assert validate_options(adamw, {"betas": [0.8, 0.9]}).betas == (0.8, 0.9)
    assert validate_options(PLUGINS["SGD"], {"momentum": 0.9}).momentum == 0.9
    assert validate_options(PLUGINS["Adafactor"], {"eps": [None, 1e-2]}).eps == (None, 1e-2)
    for wrong in ({"beta": [0.8, 0.9]}, {"betas": [0.8]}, {"amsgrad": 1}, {"eps": "1"}, {"fused": True}):
        with pytest.raises(ConfigProblems):
            validate_options(adamw, wrong)
    [problem] = plugin_of("SGD", nesterov=True).collie_check(run_of(tmp_path, "SGD"))
    assert problem.startswith("optimizer.nesterov: expected false, or true with momentum > 0 and dampening 0")
    [problem] = plugin_of("Rprop").collie_check(run_of(tmp_path, "Rprop", weight_decay=0.1))
    assert problem.startswith("optimizer.weight_decay: rprop has no weight decay")
    for name in NAMES:
        assert plugin_of(name).collie_check(run_of(tmp_path, name)) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_number_is_refused_where_torch_refuses_it(name: str) -> None:
    def admitted(make: Any) -> bool:
        try:
            make()
        except (ValueError, ConfigProblems):
            return False
        return True

    torch_class, parameter = plugin_of(name).torch_class, nn.Parameter(torch.zeros(1))
    for key, default in plugin_of(name).constructor_options.items():
        if isinstance(default, bool):
            continue
        for value in (-1.0, -1e-3, 0.0, 0.5, 1.0, 1.5):
            changed: list[Any] = [value]
            if isinstance(default, tuple):
                changed = [(*default[:i], value, *default[i + 1 :]) for i in range(len(default))]
            for option in changed:
                ours = admitted(lambda key=key, option=option: plugin_of(name, **{key: option}))
                torchs = admitted(lambda key=key, option=option: torch_class([parameter], **{key: option}))
                assert ours == torchs, (key, option)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("betas: [1.5, 0.9]", "optimizer.betas.0: expected a number >= 0 and < 1, got 1.5"),
        ("betas: 0.9", "optimizer.betas: expected [a number >= 0 and < 1, a number >= 0 and < 1], got 0.9"),
        ("eps: -1", "optimizer.eps: expected a number >= 0, got -1"),
    ],
)
def test_a_wrong_number_is_told_by_its_key_before_anything_is_read(
    option: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "train.yaml"
    file.write_text(f"model: {{path: /no/such/model}}\noptimizer:\n  name: adamw\n  {option}\n")
    assert main(["config", "check", str(file)]) == 2
    assert f"{file}:4: {message}" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_fp32_is_torch_bit_for_bit(tmp_path: Path, name: str) -> None:
    """By its fused kernel where it has one, which differs from its other code in the last bits."""
    decay = {} if name == "Rprop" else {"weight_decay": 0.1}
    plugin, run = plugin_of(name, **OPTIONS.get(name, {})), run_of(tmp_path, name, **decay)
    lrs = [0.1, 0.05, 0.025, 0.0125]

    def by_torch(**options: Any) -> nn.Module:
        theirs = model_of()
        assert isinstance(theirs, nn.Sequential)
        # torch's own grouping of what is decayed: matrices that are no embeddings
        decayed = [theirs[1].weight, theirs[3].weight]
        rest = [p for p in theirs.parameters() if all(p is not other for other in decayed)]
        groups = [{"params": rest, **({"weight_decay": 0.0} if decay else {})}, {"params": decayed, **decay}]
        reference = plugin.torch_class(groups, **plugin.constructor_options, **options)
        for step, lr in enumerate(lrs, start=1):
            for group in reference.param_groups:
                group["lr"] = lr
            set_gradients(theirs, step)
            reference.step()
        return theirs

    ours = model_of()
    advance(plugin.collie_optimizer(ours, PLACE, run), run, ours, lrs)
    plain = by_torch()
    assert equal(ours, by_torch(fused=True) if plugin.fused else plain)
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-6)
    assert not equal(ours, model_of())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("turned", ["weight", "gradient"])
@pytest.mark.parametrize("name", [name for name in NAMES if PLUGINS[name].fused])
def test_a_tensor_that_is_not_contiguous_is_updated_as_any(
    tmp_path: Path, name: str, turned: str, device: str
) -> None:
    """torch's fused kernels refuse it, or (for the CPU) take other elements of it and say nothing."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    models = [model_of().to(device), model_of().to(device)]
    weight: Any = models[0].get_parameter("1.weight")
    if turned == "weight":
        weight.data = weight.detach().t().contiguous().t()
    for model in models:
        run = run_of(tmp_path, name)
        optimizer = plugin_of(name, **OPTIONS.get(name, {})).collie_optimizer(model, PLACE, run)
        for step in (1, 2, 3):
            set_gradients(model, step)
            if model is models[0] and turned == "gradient":
                weight.grad = weight.grad.t().contiguous().t()
                assert not weight.grad.is_contiguous()
            run.step = step - 1
            optimizer.step(0.05)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-6)


def test_defaults_of_the_core_and_of_torch(tmp_path: Path) -> None:
    """Unset weight decay is torch's default; a group's rate scales with the schedule."""
    run = run_of(tmp_path, "AdamW", lr=0.1, param_groups=[{"params": "1.*", "lr": 0.2}])
    model = model_of()
    optimizer: Any = plugin_of("AdamW").collie_optimizer(model, PLACE, run)
    advance(optimizer, run, model, [0.05])
    found = {(g["lr"], g["weight_decay"]) for part in optimizer.parts for g in part.optimizer.param_groups}
    assert found == {(0.05, 0.0), (0.05, 0.01), (0.1, 0.0), (0.1, 0.01)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_optimizer_goes_on_bit_for_bit(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    lrs = [0.01, 0.02, 0.03, 0.02, 0.01, 0.005]
    plugin = plugin_of(name, **OPTIONS.get(name, {}))
    straight, first, resumed = model_of(dtype), model_of(dtype), model_of(dtype)
    run = run_of(tmp_path, name)
    advance(plugin.collie_optimizer(straight, PLACE, run), run, straight, lrs)
    run = run_of(tmp_path, name)
    optimizer = plugin.collie_optimizer(first, PLACE, run)
    advance(optimizer, run, first, lrs[:3])
    saved = optimizer.state_dict()
    assert all(isinstance(value, Tensor) for value in saved.values())
    assert {value.dtype for value in saved.values() if value.numel() > 1} <= {torch.float32}
    resumed.load_state_dict(first.state_dict())
    second = plugin.collie_optimizer(resumed, PLACE, run)
    second.load_state_dict({key: value.clone() for key, value in saved.items()})
    advance(second, run, resumed, lrs[3:])
    assert equal(straight, resumed)


def test_loading_holds_no_state_twice(tmp_path: Path) -> None:
    run, model = run_of(tmp_path, "AdamW"), model_of()
    optimizer = plugin_of("AdamW").collie_optimizer(model, PLACE, run)
    advance(optimizer, run, model, [0.1])
    saved = {key: value.clone() for key, value in optimizer.state_dict().items()}
    second = plugin_of("AdamW").collie_optimizer(model_of(), PLACE, run)
    second.load_state_dict(saved)
    live = second.state_dict()
    assert live.keys() == saved.keys()
    assert all(live[key].data_ptr() == value.data_ptr() for key, value in saved.items())


def test_state_of_an_unknown_parameter_is_refused(tmp_path: Path) -> None:
    optimizer = plugin_of("AdamW").collie_optimizer(model_of(), PLACE, run_of(tmp_path, "AdamW"))
    with pytest.raises(CheckpointError, match=r"'1\.wieght' is no parameter.*did you mean '1\.weight'"):
        optimizer.load_state_dict({"1.wieght.exp_avg": torch.zeros(5, 6)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_fp32_copy_of_the_model_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    run, model = run_of(tmp_path, "SGD"), model_of(dtype)
    optimizer: Any = plugin_of("SGD").collie_optimizer(model, PLACE, run)
    advance(optimizer, run, model, [0.1])
    assert optimizer.state_dict() == {}
    assert all(p.numel() == 0 for part in optimizer.parts for p in part.parameters)


def test_frozen_parameters_and_missing_gradients(tmp_path: Path) -> None:
    run, model = run_of(tmp_path, "AdamW"), model_of(torch.bfloat16)
    frozen, unused = model[0].weight, model[3].weight  # type: ignore[index]
    frozen.requires_grad_(False)
    before = [frozen.detach().clone(), unused.detach().clone()]
    optimizer = plugin_of("AdamW").collie_optimizer(model, PLACE, run)
    set_gradients(model, 1)
    frozen.grad = unused.grad = None
    optimizer.step(0.1)
    assert torch.equal(frozen, before[0]) and torch.equal(unused, before[1])
    assert not any(key.startswith(("0.weight", "3.weight")) for key in optimizer.state_dict())


def test_bfloat16_adamw_keeps_up_with_fp32(tmp_path: Path) -> None:
    """2,000 steps with gradients that shrink 30-fold: the second moment must fall with them (in bf16 it
    would stand still), and updates far below the last bit of a weight must add up."""
    steps, lr, size = 2000, 1e-4, 4096

    def trained(dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
        run = run_of(tmp_path, "AdamW", weight_decay=0.0)
        model = nn.ParameterDict({"w": nn.Parameter(torch.ones(size, dtype=dtype))})
        optimizer = plugin_of("AdamW").collie_optimizer(model, PLACE, run)
        generator = torch.Generator().manual_seed(0)
        for step in range(steps):
            scale = 1.0 if step < 200 else 0.03
            gradient = (0.5 + torch.randn(size, generator=generator)) * scale
            model["w"].grad = gradient.bfloat16().to(dtype)
            optimizer.step(lr)
            run.step += 1
        return model["w"].detach().float() - 1, dict(optimizer.state_dict())

    moved, state = trained(torch.bfloat16)
    expected, reference = trained(torch.float32)
    second = reference["w.exp_avg_sq"]
    assert float(second.mean()) < 0.3  # from about 1
    assert float(state["w.exp_avg_sq"].mean()) == pytest.approx(float(second.mean()), rel=0.02)
    assert float(expected.mean()) < -0.01
    assert float(moved.mean()) == pytest.approx(float(expected.mean()), rel=0.03)


def test_replicas_stay_bit_equal(tmp_path: Path) -> None:
    models = [model_of(torch.bfloat16), model_of(torch.bfloat16)]
    for rank, model in enumerate(models):
        run = run_of(tmp_path, "AdamW")
        optimizer = plugin_of("AdamW").collie_optimizer(model, PLACE, run)
        torch.manual_seed(rank)  # each rank has its own generator
        advance(optimizer, run, model, [1e-3] * 5)
    assert equal(*models)


def test_entry_points_name_these_classes() -> None:
    from importlib.metadata import entry_points

    found = {
        entry.name: entry.load()
        for entry in entry_points(group="collie.optimizers")
        if entry.value.startswith(torch_optimizers.__name__)
    }
    assert found == {name.lower(): cls for name, cls in PLUGINS.items()}
