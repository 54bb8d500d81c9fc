"""Adapters on a model: put on its structure, filled with values, saved, and merged."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from collie_core.config.problems import ConfigProblems
from collie_core.errors import CheckpointError, ConfigError, PluginError
from collie_core.files import fsync_dir, json_text
from collie_core.models.adapter_folder import BASE_FILE
from collie_core.models.packed import packings
from collie_core.models.sources import CheckpointReader, load_selected
from collie_core.registry import Registry, RunPlugins, SelectedPlugin
from collie_core.run import Run, whole_shards
from collie_core.shard import Piece, Shard

if TYPE_CHECKING:
    from collie_core.hookspecs import Adapter
    from collie_core.models.adapter_folder import AdapterSpec
    from collie_core.models.provider import SelectedProvider


def adapt(model: nn.Module, adapters: Iterable[Adapter]) -> dict[str, Adapter]:
    """Put adapters on the complete module, in order; who added which parameter.

    Raises PluginError for one that takes a parameter of the model away, or neither adds nor packs one.
    """
    added: dict[str, Adapter] = {}
    for adapter in adapters:
        before, packed = {name for name, _ in model.named_parameters()}, packings(model).keys()
        adapter.adapt(model)
        after = {name for name, _ in model.named_parameters()}
        if before - after or not (after - before or packings(model).keys() - packed):
            lost = min(before - after, default=None)
            what = f"takes {lost} away" if lost else "adds no parameter"
            raise PluginError(f"adapter {type(adapter).__name__} {what}")
        added |= {name: adapter for name, _ in model.named_parameters() if name not in before}
    return added


def initialise_added(run: Run) -> None:
    """Fill what adapters added, as far as this rank has it, by `run.shards`, once the model has its weights.

    Collective where an adapter looks at whole weights: all ranks go in the order of the model.
    """
    fill = filler(run)
    for name in run.added:
        if name in run.shards:
            fill(name, run.shards[name])


def filler(run: Run) -> Callable[[str, Shard], None]:
    """A function that fills a shard of an added parameter: from a run's checkpoint, or by its adapter."""
    trained = None if run.source is None else run.source.trained
    if trained is None:
        return lambda name, shard: run.added[name].initialise(name, shard.local.detach(), shard)
    reader = CheckpointReader(trained)

    def read(name: str, shard: Shard) -> None:
        stored = f"model.{name}"
        if stored not in reader or reader.shape(stored) != shard.shape:
            has = f"of shape {list(reader.shape(stored))}" if stored in reader else "absent"
            raise CheckpointError(f"{trained}: {name} is {has}, expected {list(shard.shape)}")
        values = shard.local.detach()
        if values.numel():
            reader.read_box(stored, Piece(values, shard.shape, shard.offsets).slices, values)

    return read


def select_adapters(specs: Sequence[AdapterSpec], plugins: RunPlugins) -> list[SelectedPlugin]:
    """The plugins of a source's adapters.  Raises PluginError or ConfigError naming the folder."""
    found = []
    for spec in specs:
        where = f"{spec.options['path']}: " if "path" in spec.options else ""
        try:
            found.append(plugins.add("adapter", spec.name, spec.options))
        except PluginError as error:
            raise PluginError(f"{where}{error}") from None
        except ConfigProblems as problems:
            raise ConfigError(f"{where}adapter {spec.name}: {problems}") from None
    return found


def make_adapters(selected: Iterable[SelectedPlugin], plugins: RunPlugins, run: Run) -> list[Adapter]:
    """The adapters of selected plugins, in order."""
    return [plugins.call_one(plugin, "collie_adapter", run=run) for plugin in selected]


def load_adapted(model: nn.Module, selected: SelectedProvider, **how: Any) -> dict[str, Adapter]:
    """Put the adapters of a source on its model on meta, and load both; who added which parameter.

    how: `device`, `dtype` and `map_files` of `load_selected`.
    """
    from collie_core.config.schema import CollieConfig

    config = CollieConfig(model={"path": str(selected.checkpoint or selected.path)})
    run = Run(config, Path(), torch.device("cpu"), source=selected)
    plugins = RunPlugins(Registry())
    run.added = adapt(model, make_adapters(select_adapters(selected.adapters, plugins), plugins, run))
    load_selected(model, selected, added=run.added, **how)
    run.shards = whole_shards(model)
    initialise_added(run)
    return run.added


def save_adapters(
    folder: Path,
    added: Mapping[str, Adapter],
    tensors: Mapping[str, Tensor],
    base_sections: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write the adapters in their libraries' layouts: one into `folder`, several into folders of their names.

    tensors: whole, by parameter name.  base_sections: of what packs the model that they are for.
    The folder appears whole, in the place of an earlier one.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}.saving")
    shutil.rmtree(aside, ignore_errors=True)
    adapters = list(dict.fromkeys(added.values()))
    try:
        for adapter in adapters:
            place = aside / adapter.name if len(adapters) > 1 else aside
            place.mkdir(parents=True)
            adapter.save(place, {name: tensors[name] for name in added if added[name] is adapter})
            if base_sections:
                (place / BASE_FILE).write_text(json_text({"adapters": list(base_sections)}), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(aside, folder)
        fsync_dir(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
