"""Choosing a plugin by name and importing it, with an answer for everything that can be wrong."""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from collie_core.config.problems import ConfigProblems, Key
from collie_core.errors import CollieError, PluginError, nearest
from collie_core.registry.contract import contract_problem
from collie_core.registry.discovery import (
    ALLOW_LIST,
    KnownPlugin,
    PluginInfo,
    discover,
    known_plugins,
    namespace_blockers,
    normalised,
)
from collie_core.registry.options import validate_options

if TYPE_CHECKING:
    from collie_core.config.schema import PluginSection

#: the name of the model plugin that serves every model type that none claims
WILDCARD = "*"


@dataclass(frozen=True)
class LoadedPlugin:
    """An imported plugin class that keeps the contract, and the seconds that its import took."""

    info: PluginInfo
    cls: type
    seconds: float


class Registry:
    """The installed plugins.  Making one reads metadata; only `load` imports, and only what is asked for."""

    def __init__(self) -> None:
        self._plugins = discover()

    def plugins(self) -> list[PluginInfo]:
        """Every installed plugin, the core's own included, by kind and name."""
        return list(self._plugins)

    def find(self, kind: str, name: str, wildcard: bool = True) -> PluginInfo:
        """The plugin that `name` (or `distribution:name`) means.

        A model type that no plugin claims is served by the one registered as `*`, unless `wildcard` is false.
        Raises PluginError for a name that is unknown, not installed, switched off or claimed twice.
        """
        claimants = self._claimants(kind, name)
        if not claimants and wildcard and kind == "model" and ":" not in name:
            claimants = self._claimants(kind, WILDCARD)
        usable = [info for info in claimants if info.status != "off"]
        if len(usable) == 1:
            return usable[0]
        if usable:
            raise PluginError(_claimed_twice(kind, name, usable))
        if claimants:
            info = claimants[0]
            raise PluginError(
                f"{kind} {name!r} of {info.distribution} is switched off: {info.problem}; "
                f"add {info.distribution} or {kind}:{info.name} to {ALLOW_LIST}"
            )
        raise PluginError(self._unknown(kind, name))

    def load(self, kind: str, name: str) -> LoadedPlugin:
        """Import the plugin that `name` means.

        Raises PluginError naming distribution, version, entry point, cause and cure where it cannot be used.
        """
        info = self.find(kind, name)
        if info.status == "broken":
            cure = "install versions of both that fit together, or remove it"
            raise PluginError(_cannot_be_used(info, info.problem, cure))
        start = time.perf_counter()
        cls = _import(info)
        seconds = time.perf_counter() - start
        problem = contract_problem(kind, cls)
        if problem or not isinstance(cls, type):
            cure = f"upgrade or remove {info.distribution}, or tell its author"
            raise PluginError(_cannot_be_used(info, problem, cure))
        return LoadedPlugin(info, cls, seconds)

    def instantiate(self, kind: str, section: Mapping[str, Any] | PluginSection, where: Key = ()) -> Any:
        """An instance of the plugin that a config section names, with its validated options.

        Raises PluginError, or ConfigProblems whose key paths begin with `where`.
        """
        if isinstance(section, Mapping):
            name, options = section["name"], {key: value for key, value in section.items() if key != "name"}
        else:
            name, options = section.name, section.options
        try:
            return make_instance(self.load(kind, name), options)
        except ConfigProblems as found:
            raise found.below(where) from None

    def check(self) -> list[LoadedPlugin | PluginInfo]:
        """Import every plugin, each by itself: a LoadedPlugin for a sound one, else what is wrong with it."""
        checked: list[LoadedPlugin | PluginInfo] = []
        for info in self._plugins:
            if info.status in ("off", "broken"):
                checked.append(info)
                continue
            try:
                checked.append(self.load(info.kind, f"{info.distribution}:{info.name}"))
            except PluginError as error:
                checked.append(replace(info, status="broken", problem=str(error)))
        return checked

    def _claimants(self, kind: str, name: str) -> list[PluginInfo]:
        distribution, _, short = name.rpartition(":")
        return [
            info
            for info in self._plugins
            if info.kind == kind
            and info.name == short
            and (not distribution or normalised(info.distribution) == normalised(distribution))
        ]

    def _unknown(self, kind: str, name: str) -> str:
        distribution, _, short = name.rpartition(":")
        usable = [info for info in self._plugins if info.kind == kind and info.status != "off"]
        installed = sorted({info.name for info in usable} - {WILDCARD})
        listed = f"installed {kind}s: {', '.join(installed) or 'none'}"
        if distribution:
            owners = sorted({i.distribution for i in self._plugins if i.kind == kind and i.name == short})
            told = f"; {kind} {short!r} comes from {', '.join(owners)}" if owners else ""
            return f"distribution {distribution!r} has no {kind} {short!r}{told}; {listed}"
        ours = [plugin for plugin in known_plugins() if plugin.kind == kind and plugin.name != WILDCARD]
        for plugin in ours:
            if plugin.name == short:
                return f"{kind} {short!r} is not installed: {where_to_get(plugin)}; {listed}"
        other = next((info.kind for info in self._plugins if info.name == short), None)
        if other is not None:
            return f"unknown {kind} {short!r}: it is {_a(other)}, not {_a(kind)}; {listed}"
        hint = nearest(short.lower(), [*installed, *(plugin.name for plugin in ours if plugin.released)])
        return f"unknown {kind} {short!r}{hint}; {listed}"


def make_instance(
    loaded: LoadedPlugin, options: Mapping[str, Any], core_keys: Sequence[str] = ()
) -> Any:
    """`cls(options)`, or `cls()` where the plugin has no `Options`.

    Raises ConfigProblems for wrong options, PluginError where the constructor fails.
    """
    validated = validate_options(loaded.cls, options, core_keys)
    try:
        return loaded.cls() if validated is None else loaded.cls(validated)
    except CollieError:
        raise
    except Exception as error:
        cause = f"making it failed: {describe_error(error)}"
        cure = f"tell the author of {loaded.info.distribution}"
        raise PluginError(_cannot_be_used(loaded.info, cause, cure)) from error


def describe_error(error: BaseException) -> str:
    """Type, message and place of an error, in one line."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen")]
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def _import(info: PluginInfo) -> object:
    try:
        return info.entry_point.load()
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # a module that calls sys.exit at import must not end the command either
        blockers = namespace_blockers() if isinstance(error, ImportError) else []
        cause = f"importing {info.value} failed: {describe_error(error)}"
        name = info.distribution
        cure = f"install what it needs (pip install --upgrade {name}), or remove it (pip uninstall {name})"
        raise PluginError(_cannot_be_used(info, "\n  ".join([cause, *blockers]), cure)) from error


def _cannot_be_used(info: PluginInfo, cause: str, cure: str) -> str:
    return f"{info.kind} {info.name!r} cannot be used: {cause}\n  provided by {info.origin}\n  cure: {cure}"


def _claimed_twice(kind: str, name: str, claimants: list[PluginInfo]) -> str:
    lines = "".join(f"\n  - {info.origin}" for info in claimants)
    names = " or ".join(f"{info.distribution}:{info.name}" for info in claimants)
    head = f"{kind} {name!r} is claimed by {len(claimants)} distributions"
    return f"{head}:{lines}\n  write {names}, or uninstall one"


def where_to_get(plugin: KnownPlugin) -> str:
    """How a plugin of this project is installed, for messages."""
    if not plugin.released:
        return f"it is planned as {plugin.distribution}, which does not exist yet"
    line = f"pip install {plugin.distribution}"
    return f"{line} (from a checkout: make wheels, then pip install --find-links dist {plugin.distribution})"


def _a(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
