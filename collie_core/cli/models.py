"""`collie models [NAME] [--json]`: model families, installed or not, and their known checkpoints."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass

from collie_core.cli.listing import show, state
from collie_core.registry.declarations import declared
from collie_core.registry.discovery import discover, known_plugins
from collie_core.registry.registry import WILDCARD


@dataclass(frozen=True)
class Family:
    """A model plugin.  status: that of `collie plugins`, or `missing`; version: "" where it is missing."""

    name: str
    status: str
    distribution: str
    version: str
    summary: str
    supports: tuple[str, ...]
    checkpoints: tuple[Mapping[str, str], ...]
    problem: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("name", nargs="?", help="only this family")
    parser.add_argument("--json", action="store_true", help="print one JSON list")


def run(args: argparse.Namespace) -> int:
    """Print the families.  Raises UserError for a name that none has."""
    return show(args, families(), "model family", _lines)


def families() -> list[Family]:
    """Installed families first by name, then those of this project that are not; nothing is imported.

    A plugin that serves all other model types under a second name is listed by the first.
    """
    models = [info for info in discover() if info.kind == "model"]
    named = {info.value for info in models if info.name != WILDCARD}
    installed = [
        Family(
            info.name,
            info.status,
            info.distribution,
            info.version,
            (declarations := declared(info.value)).summary or info.summary,
            declarations.supports,
            declarations.checkpoints,
            info.problem,
        )
        for info in models
        if info.name != WILDCARD or info.value not in named
    ]
    present = {family.name for family in installed} | {info.name for info in models}
    known = [plugin for plugin in known_plugins() if plugin.kind == "model"]
    named = {plugin.distribution for plugin in known if plugin.name != WILDCARD}
    missing = [
        Family(
            plugin.name,
            "missing",
            plugin.distribution,
            "",
            plugin.summary,
            tuple(plugin.supports),
            tuple(plugin.checkpoints),
            "" if plugin.released else "planned",
        )
        for plugin in known
        if plugin.name not in present and (plugin.name != WILDCARD or plugin.distribution not in named)
    ]
    return installed + missing


def _lines(family: Family) -> list[str]:
    """The family, what it supports, and a line a checkpoint."""
    lines = [f"{family.name}  {family.summary}", f"  {state(family)}"]
    if family.supports:
        lines.append(f"  supports {', '.join(family.supports)}")
    width = max((len(checkpoint["name"]) for checkpoint in family.checkpoints), default=0)
    for checkpoint in family.checkpoints:
        size, licence = checkpoint.get("parameters", ""), checkpoint.get("licence", "")
        lines.append(f"    {checkpoint['name']:{width}}  {size:>6}  {licence}".rstrip())
    return lines
