"""docs/monitors.md: its Python runs, its options and keys are the real ones."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from collie_core.config.schema import CollieConfig
from collie_core.monitors.console import Console
from collie_core.registry.options import validate_options
from collie_core.run import Run
from collie_monitors.csv_monitor import Csv
from collie_monitors.tensorboard_monitor import TensorBoard
from collie_monitors.wandb_monitor import WandB

DOCS = (Path(__file__).parents[2] / "docs" / "monitors.md").read_text()


def snippet(language: str) -> str:
    """The first code block in a language."""
    found = re.search(rf"```{language}\n(.*?)```", DOCS, re.DOTALL)
    assert found
    return found.group(1)


def test_the_monitor_that_is_shown_works(make_run: Callable[..., Run]) -> None:
    names: dict[str, Any] = {}
    exec(compile(snippet("python"), "monitors.md", "exec"), names)
    run = make_run()
    monitor = names["Best"](names["Best"].Options(key="loss")).collie_monitor(run=run)
    for step, loss in enumerate((3.0, 1.5, 2.0), start=1):
        monitor.log(step, {"step": step, "loss": loss})
    monitor.log(3, {"perplexity/perplexity": 1.0})
    monitor.close(None)
    assert (run.output_dir / "best.txt").read_text() == "step 2: 1.5\n"


def test_the_config_that_is_shown_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text("model: {path: some/model}\n" + snippet("yaml"))
    sections = CollieConfig.from_yaml(path).monitors
    assert [section.name for section in sections] == ["console", "tensorboard", "csv", "wandb"]
    assert validate_options(WandB, sections[3].options) == WandB.Options(project="demo")


@pytest.mark.parametrize(
    ("name", "plugin"), [("console", Console), ("csv", Csv), ("tensorboard", TensorBoard), ("wandb", WandB)]
)
def test_every_option_is_documented_and_no_other(name: str, plugin: Any) -> None:
    [row] = [line for line in DOCS.splitlines() if line.startswith(f"| `{name}` |")]
    options = {field.name for field in dataclasses.fields(plugin.Options)}
    documented = set(re.findall(r"`(\w+)`", row.split("|")[4])) - {"output_dir"}
    assert documented == options
