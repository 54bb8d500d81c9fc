"""The model of a run and its provider: from the config, the user's own object, or the run's checkpoint."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from collie_core.config.problems import ConfigProblems
from collie_core.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from collie_core.checkpoint.folder import Checkpoint
    from collie_core.hookspecs import Layout, ModelProvider
    from collie_core.models.provider import SelectedProvider
    from collie_core.registry import RunPlugins
    from collie_core.run import Run
    from collie_core.train.trainer import Trainer


def open_model(
    trainer: Trainer, run: Run, plugins: RunPlugins, stack: ExitStack, checkpoint: Checkpoint | None = None
) -> ModelProvider:
    """Find the model and its provider; read its config and tokenizer.

    checkpoint: of this run.  The weights come from there, and the model that the run began with may be gone;
    unless it has adapters alone, and then these come from there.
    """
    from collie_core.models.provider import select_provider
    from collie_core.models.sources import locate
    from collie_core.together import from_first_on_node

    section = run.config.model
    origin = getattr(trainer.model, "origin", None)
    given = trainer.model is not None and not next(trainer.model.parameters()).is_meta
    path = origin.path if origin is not None and not given and origin.path else section.path

    def select(path: str | Path, provider: str | None, weights: bool) -> SelectedProvider:
        """One process of each machine downloads or verifies for all."""
        source = from_first_on_node(lambda: locate(path, section.revision, weights), run.control)
        return select_provider(path, provider, plugins=plugins, run=run, source=source)

    if checkpoint is None or run.config.adapters or given:
        selected = select(path, section.provider, weights=not given)
        if checkpoint is not None and run.config.adapters:
            selected = replace(selected, trained=checkpoint.path)
    else:
        provider = section.provider or checkpoint.state().get("provider")
        try:
            selected = select(path, provider, weights=False)
        except CheckpointError:  # a copy, as the checkpoint is deleted in time
            copy = Path(stack.enter_context(TemporaryDirectory(prefix="collie-model-")))
            shutil.copytree(checkpoint.path / "model_files", copy, dirs_exist_ok=True)
            selected = select_provider(copy, provider, plugins=plugins, run=run, weights=False)
        selected = replace(selected, checkpoint=checkpoint.path)
    if given and origin is not None:
        selected = replace(
            selected, provider=origin.provider, config=origin.config, hf_config=origin.hf_config
        )
    run.source = selected
    if given:
        _same_shapes(trainer, run)
    run.tokenizer = trainer.tokenizer or _tokenizer(selected)
    return selected.provider


def _tokenizer(selected: SelectedProvider) -> Any:
    """The tokenizer beside the model, or None where no file of one is there."""
    from collie_core.models.export import has_tokenizer

    try:
        return selected.provider.tokenizer(selected.path)
    except CheckpointError:
        if has_tokenizer(selected.path):
            raise
        return None


def _same_shapes(trainer: Trainer, run: Run) -> None:
    """Refuse a model object that could be trained but not be written as its config says."""
    from collie_core.models.auto import build_model
    from collie_core.models.loading import Slots

    assert trainer.model is not None and run.source is not None
    described, given = Slots(build_model(run.source)), Slots(trainer.model)
    added = getattr(trainer.model, "adapters", {})
    for name in sorted((described.tensors.keys() | given.tensors.keys()) - set(added)):
        shapes = [list(of.shape(name)) if name in of.tensors else None for of in (described, given)]
        if shapes[0] != shapes[1]:
            raise ConfigError(
                f"Trainer(model=...): {name} is {shapes[1] or 'absent'}, but the config of {run.source.path} "
                f"asks for {shapes[0] or 'no such parameter'}"
            )


def check_model(run: Run, plugins: RunPlugins, layout: Layout) -> None:
    """Refuse what does not fit the model by its shapes alone, before time goes into data and weights.

    Raises ConfigError for patterns of parameters and sizes, CheckpointError for tensors, by name.
    A module with weights is known to fit.
    """
    from collie_core.layouts.build import set_trainable
    from collie_core.models.adapters import adapt, make_adapters
    from collie_core.models.auto import build_model
    from collie_core.models.loading import Slots, match_weights
    from collie_core.models.sources import open_source
    from collie_core.together import from_first

    source = run.source
    assert source is not None
    if run.model is not None and not next(run.model.parameters()).is_meta:
        return
    adapters = make_adapters(plugins.of_kind("adapter"), plugins, run)
    model = build_model(source)
    added = adapt(model, adapters)
    set_trainable(model, replace(run, added=added))
    if run.model_built is not None:
        run.model_built(model)
    check = getattr(layout, "check_model", None)
    if check is not None:
        check(model, source.provider, adapters)

    def match() -> None:
        slots = Slots(model)
        reader, rules = open_source(source, slots, added)
        match_weights(slots, rules, reader, added)

    from_first(match, run.control)


def without_adapters(run: Run) -> None:
    """Refuse to train on top of adapters that are not merged."""
    if (run.source is not None and run.source.adapters) or getattr(run.model, "adapters", None):
        message = (
            "has adapters: name its base model here and the adapter in adapters ({name: ..., path: folder}), "
            "or merge it first (collie export --merge, model.merge_adapters())"
        )
        raise run.config.problems(ConfigProblems([(("model", "path"), message)]))
