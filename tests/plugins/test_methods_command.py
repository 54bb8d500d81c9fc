"""`collie methods`: declared costs are those of real states, combinations those of the checks."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from collie_core import CollieConfig
from collie_core.cli.main import main
from collie_core.cli.methods import methods
from collie_core.data.batch import StepBatch
from collie_core.registry import Registry
from collie_core.registry.options import validate_options
from collie_core.run import Run
from collie_core.train.setup import checked_plugins

OPTIMIZERS = {m.name: m for m in methods() if m.kind == "optimizer" and m.status != "missing"}
ADAPTERS = {m.name: m for m in methods() if m.kind == "adapter" and m.status != "missing"}
CASES = [(name, options) for name, method in OPTIMIZERS.items() for options in method.states]
INSTALLED = Registry()
#: word -> layouts of which one at least is accepted
UNDER: dict[str, list[dict[str, Any]]] = {
    "zero": [{"dp_size": 2, "layout": {"zero_stage": 3}}],
    "tp": [{"tp_size": 2}],
    "pp": [{"pp_size": 2, "train": {"gradient_accumulation_steps": 2}}],
    "deepspeed": [{"dp_size": 2, "layout": {"name": "deepspeed", "zero_stage": n}} for n in (1, 2, 3)],
}


def accepted(word: str, **sections: Any) -> bool:
    """Whether the plugins' own checks let a method train under a layout."""
    return any(
        not checked_plugins(CollieConfig(model={"path": "model"}, **sections, **keys), INSTALLED)[2]
        for keys in UNDER[word]
    )


class Tiny(nn.Module):
    """A matrix of a block, a vector, an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 256)
        self.blocks = nn.ModuleDict({"0": nn.Linear(256, 16)})
        self.head = nn.Linear(256, 8, bias=False)


def held(parameter: str, weight: Tensor, what: str) -> int:
    """How many of `what` a parameter has."""
    matrix = weight.ndim > 1
    of_block = matrix and parameter.startswith("blocks.")
    return {
        "element": weight.numel(),
        "vector element": weight.numel() * (not matrix),
        "matrix element": weight.numel() * matrix,
        "row": weight.shape[0] * matrix,
        "column": weight.shape[-1] * matrix,
        "block matrix element": weight.numel() * of_block,
        "other element": weight.numel() * (not of_block),
    }[what]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name, options", CASES)
def test_declared_bytes_are_those_of_the_states(name: str, options: str, dtype: torch.dtype) -> None:
    plugin = Registry().load("optimizer", name).cls
    made: Any = plugin(validate_options(plugin, yaml.safe_load(f"{{{options}}}")))
    run = Run(CollieConfig(model={"path": "unused"}, optimizer={"name": name}), Path(), torch.device("cpu"))
    model = Tiny().to(dtype)
    given = {"model": model, "run": run, "layout": SimpleNamespace(needs_norm=False)}
    accepted = made.collie_optimizer.__code__.co_varnames[: made.collie_optimizer.__code__.co_argcount]
    optimizer = made.collie_optimizer(**{key: value for key, value in given.items() if key in accepted})
    optimizer.passes(StepBatch(1, 0, (), 1, 1))
    parameters = dict(model.named_parameters())
    for parameter_name, parameter in parameters.items():
        if optimizer.in_backward:
            optimizer.begin_pass("update", 1e-3, 1.0, 1.0)
            optimizer.update(parameter_name, parameter, torch.randn_like(parameter), torch.tensor(True))
        else:
            parameter.grad = torch.randn_like(parameter)
    if not optimizer.in_backward:
        optimizer.step(1e-3)
    state = optimizer.state_dict().values()
    found = sum(value.numel() * value.element_size() for value in state if value.numel() > 1)  # no counts
    declared = OPTIMIZERS[name].states[options]
    assert found == sum(
        size * held(parameter_name, parameter, what)
        for what, size in declared.items()
        for parameter_name, parameter in parameters.items()
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_declared_combinations_are_those_that_are_accepted(name: str) -> None:
    plugin, supports = Registry().load("optimizer", name).cls, OPTIMIZERS[name].supports
    for word in UNDER:
        assert (word in supports) == accepted(word, optimizer={"name": name}), word
    options = getattr(plugin, "Options", None)
    fields = {field.name for field in dataclasses.fields(options)} if options else set()
    for option in ("in_backward", "state_dtype"):
        assert (option in supports) == (option in fields), option
    assert "adapters" in supports


@pytest.mark.parametrize("name", [name for name, method in ADAPTERS.items() if method.supports])
def test_declared_combinations_of_adapters_are_those_that_are_accepted(name: str) -> None:
    on_top = ["lora"] if name in ("nf4", "int8") else []  # they train nothing themselves
    for word in UNDER:
        assert (word in ADAPTERS[name].supports) == accepted(word, adapters=[name, *on_top]), word


def test_no_plugin_and_no_torch_is_imported() -> None:
    code = (
        "import sys; from collie_core.cli.main import main; assert main(['methods']) == 0; "
        "heavy = {'torch', 'transformers', 'pydantic', 'collie_methods.lomo', 'collie_methods.optimizers'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    adamw = done.stdout.split("\nadamw  ")[1].split("\nadamw8bit  ")[0].splitlines()
    assert adamw[2] == (
        "  weights 2 bytes a parameter (4 in float32), gradients 2 (4); none with in_backward: true"
    )
    assert adamw[3:5] == [
        "  states: 8 bytes an element",
        "  states with state_dtype: bfloat16: 4 bytes an element",
    ]
    nf4 = done.stdout.split("\nnf4  ")[1].splitlines()
    assert nf4[2].startswith(
        "  weights 2 bytes a parameter (4 in float32), but those of the blocks' linears 0.5625, "
        "0.625 with block_size: 32, "
    )


def test_json_is_one_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--json"]) == 0
    found = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert found["lomo"]["gradients"] == {"bfloat16": 0, "float16": 0, "float32": 0}
    assert found["lomo"]["in_backward"] and not any(found["lomo"]["states"][""].values())
    assert found["adamw"]["weights"] == {"bfloat16": 2, "float16": 2, "float32": 4}
    assert found["adamw"]["states"]["state_dtype: bfloat16"] == {"element": 4}
    assert found["nf4"]["weights"][""] == 0.5625 and found["int8"]["weights"]["block_size: 32"] == 1.125
    assert found["lora"]["weights"] == found["adamw"]["weights"]
    assert found["lora"]["kind"] == "adapter" and not any(found["lora"]["gradients"].values())
    for entry in found.values():
        assert entry["summary"] and (entry["kind"] == "adapter" or (entry["states"] and entry["supports"]))


def test_a_strangers_method_is_read_though_it_cannot_be_imported(
    install: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    source = '''
import no_such_library


class Base:
    supports = ("zero",)
    state_bytes = {"": {"element": 4, "wrong": "four"}, "3": 5}
    weight_bytes = {"": 3, "wrong": None}


class Plugin(Base):
    """Acme's optimizer.

    More of it."""

    in_backward = True
    state_bytes_of = made()
'''
    distribution = install(source, kind="optimizer", name="acme")
    assert main(["methods", "acme", "--json"]) == 0
    [entry] = json.loads(capsys.readouterr().out)
    assert (entry["distribution"], entry["summary"]) == (distribution, "Acme's optimizer")
    assert (entry["in_backward"], entry["supports"]) == (True, ["zero"])
    assert (entry["states"], entry["weights"]) == ({"": {"element": 4}}, {"": 3})


def test_an_unknown_method_gets_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "adalom"]) == 2
    assert "no optimizer or adapter 'adalom', did you mean 'adalomo'" in capsys.readouterr().err
