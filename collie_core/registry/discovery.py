"""What is installed, read from the metadata of distributions: nothing of a plugin is imported.

`COLLIE_PLUGINS`, if set and not empty, is an allow-list of distributions (`collie-lomo`) and plugins
(`optimizer:lomo`), separated by commas or spaces; every other plugin is off, the core's own too.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path

from collie_core import __version__
from collie_core.hookspecs import GROUPS

ALLOW_LIST = "COLLIE_PLUGINS"
NAMESPACES = ("collie_models", "collie_methods", "collie_monitors")
CORE = "collie-core"


@dataclass(frozen=True)
class PluginInfo:
    """One entry point of an installed distribution.

    status is `found` (nothing known against it), `ok` (imported and checked), `off` (not in COLLIE_PLUGINS),
    `duplicate` (several distributions claim the name: usable as `distribution:name`) or `broken`; for the
    last three `problem` says why.  value is the entry point's `module:class`.
    """

    kind: str
    group: str
    name: str
    distribution: str
    version: str
    value: str
    summary: str
    status: str
    problem: str
    entry_point: metadata.EntryPoint = field(repr=False, compare=False)

    @property
    def origin(self) -> str:
        """Distribution, version and entry point, for messages."""
        return f"{self.distribution} {self.version} (entry point {self.name} = {self.value} of {self.group})"


@dataclass(frozen=True)
class KnownPlugin:
    """A plugin of this project, installed or not; for hints and lists only.

    supports, checkpoints, in_backward, state_bytes, weight_bytes: what it declares (see `declarations`).
    """

    kind: str
    name: str
    distribution: str
    summary: str
    released: bool
    supports: tuple[str, ...] = ()
    checkpoints: tuple[Mapping[str, str], ...] = ()
    in_backward: bool = False
    state_bytes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    weight_bytes: Mapping[str, float] = field(default_factory=dict)


def known_plugins() -> list[KnownPlugin]:
    """The contents of the generated `known_plugins.json`."""
    text = Path(__file__).parent.with_name("known_plugins.json").read_text(encoding="utf-8")
    return [KnownPlugin(**entry) for entry in json.loads(text)]


def normalised(distribution: str) -> str:
    """A distribution's name in the form that the package index compares."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def discover() -> list[PluginInfo]:
    """Every installed plugin, by kind, then name, then distribution; one scan, nothing imported."""
    known = {(plugin.kind, plugin.name, plugin.distribution): plugin.summary for plugin in known_plugins()}
    facts: dict[int, _Facts] = {}  # by the identity of the distribution, which its entry points share
    found = []
    entry_points = metadata.entry_points()
    for kind, group in GROUPS.items():
        for entry_point in entry_points.select(group=group):
            dist = entry_point.dist
            if id(dist) not in facts:
                facts[id(dist)] = _facts(dist)
            fact = facts[id(dist)]
            found.append(
                PluginInfo(
                    kind=kind,
                    group=group,
                    name=entry_point.name,
                    distribution=fact.name,
                    version=fact.version,
                    value=entry_point.value,
                    summary=known.get((kind, entry_point.name, normalised(fact.name)), fact.summary),
                    status="broken" if fact.problem else "found",
                    problem=fact.problem,
                    entry_point=entry_point,
                )
            )
    order = {kind: position for position, kind in enumerate(GROUPS)}
    found.sort(key=lambda info: (order[info.kind], info.name, info.distribution))
    return _mark_duplicates(_mark_off(found, os.environ))


@dataclass(frozen=True)
class _Facts:
    name: str
    version: str
    summary: str
    problem: str


def _facts(dist: metadata.Distribution | None) -> _Facts:
    meta = None if dist is None else dist.metadata
    if dist is None or meta is None or not meta["Name"] or not meta["Version"]:
        return _Facts("unknown", "?", "", "the metadata of its distribution is damaged")
    requires = meta.get_all("Requires-Dist") or dist.requires or []  # the latter parses the metadata anew
    return _Facts(meta["Name"], meta["Version"], meta["Summary"] or "", _core_problem(requires))


def _core_problem(requirements: list[str]) -> str:
    """Why the distribution's own requirement does not admit this core, or ""."""
    for text in requirements:
        if not re.match(r"collie[-_.]core\b", text, re.IGNORECASE):
            continue
        from packaging.requirements import InvalidRequirement, Requirement  # 10 ms, if there is a plugin

        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            return f"its requirement {text!r} cannot be read"
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        if not requirement.specifier.contains(__version__, prereleases=True):
            return f"it needs {CORE}{requirement.specifier}, but {CORE} {__version__} is installed"
    return ""


def _mark_off(found: list[PluginInfo], environment: Mapping[str, str]) -> list[PluginInfo]:
    text = environment.get(ALLOW_LIST, "")
    allowed = {part if ":" in part else normalised(part) for part in re.split(r"[,\s]+", text) if part}
    if not allowed:
        return found
    problem = f"it is not in the allow-list {ALLOW_LIST}={text}"
    return [
        info
        if {normalised(info.distribution), f"{info.kind}:{info.name}"} & allowed
        else replace(info, status="off", problem=problem)
        for info in found
    ]


def _mark_duplicates(found: list[PluginInfo]) -> list[PluginInfo]:
    claims = Counter((info.kind, info.name) for info in found if info.status != "off")
    return [
        replace(info, status="duplicate", problem=f"claimed twice: write {info.distribution}:{info.name}")
        if info.status == "found" and claims[info.kind, info.name] > 1
        else info
        for info in found
    ]


def namespace_blockers() -> list[str]:
    """What closes a shared namespace: a distribution with, say, a `collie_models/__init__.py` of its own.

    Python then takes `collie_models` for an ordinary package, and the plugins of other folders vanish.
    """
    blockers = []
    for namespace in NAMESPACES:
        spec = importlib.util.find_spec(namespace)
        if spec is not None and spec.origin is not None:
            owner = _owner(Path(spec.origin))
            cure = f"pip uninstall {owner.split()[0]}" if owner else "remove that file"
            of = f" of distribution {owner}" if owner else ""
            closes = f"{spec.origin}{of} closes the shared namespace {namespace} and hides other plugins"
            blockers.append(f"{closes}; cure: {cure}")
    return blockers


def _owner(file: Path) -> str:
    """`name version` of the distribution that installed `file`, or ""."""
    for dist in metadata.distributions():
        for entry in dist.files or []:
            if entry.name == file.name and Path(str(entry.locate())) == file:
                return f"{dist.metadata['Name']} {dist.version}"
    return ""
