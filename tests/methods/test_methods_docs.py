"""docs/methods.md: its defaults are the code's, and its loop runs."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from collie_core.optimizers.torch_optimizers import TorchOptimizerPlugin
from collie_methods.lomo import AdaLomoPlugin, LomoPlugin

DOCS = Path(__file__).parents[2] / "docs" / "methods.md"


def test_default_rates() -> None:
    section = DOCS.read_text().split("## Which to take")[1].split("\n## ")[0]
    stated: dict[str, float] = {}
    for names, rate in re.findall(r"^\| (`[^|]+`) \| ([0-9.e-]+) \|", section, re.MULTILINE):
        stated |= {name: float(rate) for name in re.findall(r"`(\w+)`", names)}
    plugins: dict[str, Any] = {"lomo": LomoPlugin, "adalomo": AdaLomoPlugin}
    plugins |= {cls.__name__.lower(): cls for cls in TorchOptimizerPlugin.__subclasses__()}
    assert stated == {name: plugin.default_lr for name, plugin in plugins.items()}


class Squared(torch.nn.Linear):
    """A model whose output has a `loss`."""

    def __init__(self) -> None:
        super().__init__(3, 1)

    def forward(self, x: torch.Tensor) -> Any:
        return SimpleNamespace(loss=super().forward(x).square().mean())


def test_the_loop_without_the_trainer() -> None:
    [snippet] = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    model = Squared()
    before = model.weight.detach().clone()
    exec(snippet, {"model": model, "batches": [{"x": torch.ones(2, 3)}] * 2})
    assert not torch.equal(model.weight, before)
