"""docs/from-collie-2023.md names keys of the config, hooks, arguments and figures that there are."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

from collie_core import CollieConfig, Trainer, hookspecs
from collie_core.layouts.native import NativeLayoutPlugin

PAGE = Path(__file__).resolve().parents[2] / "docs" / "from-collie-2023.md"
FIELDS = (
    "seed dp_size tp_size pp_size pp_partition_method train_epochs eval_per_n_steps eval_per_n_epochs "
    "train_micro_batch_size gradient_accumulation_steps eval_batch_size checkpointing use_flash dropout "
    "initization_method low_cpu_mem_usage ds_config peft_config quantization_config model_config"
).split()


def rows(title: str) -> Iterator[tuple[str, str]]:
    section = PAGE.read_text().split(f"## {title}\n")[1].split("\n## ")[0]
    for line in section.splitlines():
        if line.startswith("| ") and not line.startswith("| then"):
            then, now = line.strip("| ").split(" | ")
            yield then, now


def names(text: str) -> list[str]:
    return re.findall(r"`([a-z_.]+)`", text)


def known_keys() -> set[str]:
    mapping = CollieConfig(model={"path": "x"}).to_mapping()
    below = {f"{key}.{name}" for key, value in mapping.items() if isinstance(value, dict) for name in value}
    return {*mapping, *below, "layout.pp_partition", "layout.ds_config"}


def test_every_field_of_the_config_has_a_row_and_every_key_exists() -> None:
    table = dict(rows("CollieConfig"))
    told = {name for then in table for name in names(then)}
    assert told >= set(FIELDS)
    keys = {name for now in table.values() for name in names(now)}
    assert keys - known_keys() == {"parameters", "uniform", "deepspeed", "config.json"}
    assert hasattr(NativeLayoutPlugin.Options(), "pp_partition")


def test_the_arguments_of_the_trainer_and_its_keys_exist() -> None:
    arguments = set(inspect.signature(Trainer).parameters)
    allowed = known_keys() | arguments | {"model.generate"}
    for _, now in rows("Trainer"):
        assert set(names(now)) <= allowed, now


def test_the_hooks_exist() -> None:
    hooks = {name for _, now in rows("Callbacks") for name in names(now) if name.startswith("collie_")}
    assert len(hooks) > 10 and all(hasattr(hookspecs, name) for name in hooks)


def test_the_figures_are_those_of_a_step() -> None:
    from collie_core.train import loop

    source = inspect.getsource(loop)
    figures = [name for _, now in rows("Monitors") for name in names(now) if "/" not in name]
    assert figures and all(f'"{name}"' in source for name in figures)
