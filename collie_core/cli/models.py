"""`collie models [NAME] [--json]`: model families, installed or not, and their known checkpoints."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from collie_core.errors import UserError, nearest
from collie_core.registry.declarations import declared
from collie_core.registry.discovery import discover, known_plugins
from collie_core.registry.registry import WILDCARD

INSTALLED = ("found", "ok", "duplicate")


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
    found = families()
    if args.name is not None:
        names = [family.name for family in found]
        found = [family for family in found if family.name == args.name]
        if not found:
            raise UserError(f"no model family {args.name!r}{nearest(args.name, names)}")
    if args.json:
        print(json.dumps([asdict(family) for family in found], indent=1))
    else:
        print("\n".join(line for family in found for line in _lines(family)))
    return 0


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
    if family.status in INSTALLED:
        state = f"installed ({family.distribution} {family.version})"
    elif family.status == "missing":
        state = f"not installed: {family.problem or f'pip install {family.distribution}'}"
    else:
        state = f"{family.status} ({family.distribution} {family.version}): {family.problem}"
    lines = [f"{family.name}  {family.summary}", f"  {state}"]
    if family.supports:
        lines.append(f"  supports {', '.join(family.supports)}")
    width = max((len(checkpoint["name"]) for checkpoint in family.checkpoints), default=0)
    for checkpoint in family.checkpoints:
        size, licence = checkpoint.get("parameters", ""), checkpoint.get("licence", "")
        lines.append(f"    {checkpoint['name']:{width}}  {size:>6}  {licence}".rstrip())
    return lines
