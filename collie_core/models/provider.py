"""Which model plugin serves a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collie_core.errors import CheckpointError, ConfigError, PluginError
from collie_core.files import read_json_object
from collie_core.registry import PluginInfo, Registry, RunPlugins
from collie_core.registry.discovery import known_plugins
from collie_core.registry.registry import WILDCARD, where_to_get

if TYPE_CHECKING:
    from collie_core.hookspecs import ModelProvider
    from collie_core.models.adapter_folder import AdapterSpec
    from collie_core.models.sources import ModelSource
    from collie_core.run import Run


@dataclass(frozen=True)
class CheckpointInfo:
    """What `collie_model_provider` is given: the folder (None: there are no weights) and its config.json."""

    path: Path | None
    config: dict[str, Any]


@dataclass(frozen=True)
class SelectedProvider:
    """A provider, and what it made of the checkpoint's config.

    name: the plugin's name.  config: the provider's own config.  hf_config: the mapping in config.json.
    path: the folder with config.json.  checkpoint: where the weights are, if not in `path`.
    adapters, trained: see `ModelSource`.
    """

    provider: ModelProvider
    name: str
    config: Any
    hf_config: dict[str, Any]
    path: Path
    plugin: PluginInfo | None
    checkpoint: Path | None = None
    adapters: tuple[AdapterSpec, ...] = ()
    trained: Path | None = None


def select_provider(
    path: str | Path,
    provider: str | None = None,
    revision: str | None = None,
    plugins: RunPlugins | None = None,
    run: Run | None = None,
    weights: bool = True,
    source: ModelSource | None = None,
) -> SelectedProvider:
    """The provider for a folder in Hugging Face layout, a hub id (downloaded), a run folder or a checkpoint.

    provider: a model plugin's name, instead of the checkpoint's model_type; a checkpoint of a run is read by
    the one that made it, whose names its tensors have.  plugins: those of the run.
    weights: false where they will not be read, see `locate`.  source: what `locate` found at `path`.
    Raises CheckpointError without a readable config.json, PluginError where no plugin serves it, ConfigError
    where the plugin does not support the config.
    """
    from collie_core.models.sources import locate

    source = locate(path, revision, weights) if source is None else source
    hf_config = read_hf_config(source.folder)
    written = source.trained or source.checkpoint
    if provider is None and written is not None:
        provider = _provider_of(written)
    return replace(
        provider_for(hf_config, source.folder, provider, plugins, run),
        checkpoint=source.checkpoint,
        adapters=source.adapters,
        trained=source.trained,
    )


def _provider_of(checkpoint: Path) -> str | None:
    """The model plugin of the run that wrote a checkpoint, as its config names it, or else its own name."""
    from collie_core.checkpoint.folder import read_state

    state = read_state(checkpoint)
    chosen = state.get("config", {}).get("model", {}).get("provider") or state.get("provider")
    return chosen if isinstance(chosen, str) else None


def provider_for(
    hf_config: Mapping[str, Any],
    folder: Path | None,
    provider: str | None = None,
    plugins: RunPlugins | None = None,
    run: Run | None = None,
) -> SelectedProvider:
    """As `select_provider`, for a config that is already known."""
    content = dict(hf_config)
    where = f"{folder / 'config.json'}: " if folder else ""
    name = provider or content.get("model_type")
    if not isinstance(name, str):
        raise CheckpointError(f"{where}has no model_type; name the model plugin with model.provider")
    plugins = RunPlugins(Registry()) if plugins is None else plugins
    try:
        plugins.registry.find("model", name, wildcard=provider is None)
        plugin = plugins.add("model", name)
    except PluginError as error:
        raise PluginError(str(error) if provider else f"{where}model_type: {error}") from None
    made: ModelProvider = plugins.call_one(
        plugin, "collie_model_provider", checkpoint=CheckpointInfo(folder, content), run=run
    )
    try:
        config = made.read_config(content)
    except ConfigError as error:
        raise ConfigError(f"{where}{error}{_better(plugin.info, content.get('model_type'))}") from None
    known_name = plugin.info.name if plugin.info else name
    return SelectedProvider(made, known_name, config, content, folder or Path(), plugin.info)


def _better(used: PluginInfo | None, model_type: object) -> str:
    """A hint where the plugin for all other model types was asked for lack of the family's own."""
    if used is None or used.name != WILDCARD:
        return ""
    own = [plugin for plugin in known_plugins() if plugin.kind == "model" and plugin.name == model_type]
    return f"; a plugin of its own serves {model_type}: {where_to_get(own[0])}" if own else ""


def read_hf_config(folder: Path) -> dict[str, Any]:
    """The mapping in `config.json`.  Raises CheckpointError where there is none."""
    path = folder / "config.json"
    if not path.exists():
        raise CheckpointError(f"{folder}: no config.json, so this is no model in Hugging Face layout")
    return read_json_object(path)
