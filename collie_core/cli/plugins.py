"""`collie plugins [--check] [--json]`: every installed plugin, read from metadata."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from collie_core.registry.discovery import PluginInfo, discover, namespace_blockers

FIELDS = ("kind", "group", "name", "distribution", "version", "summary", "status", "problem")
#: seconds of a plugin's own import that are worth a remark
SLOW = 2.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    parser.add_argument(
        "--check", action="store_true", help="import and check each; status 1 if one is broken"
    )


def run(args: argparse.Namespace) -> int:
    """Print the list."""
    plugins = _checked() if args.check else discover()
    if args.json:
        print(json.dumps([{field: getattr(info, field) for field in FIELDS} for info in plugins], indent=1))
    else:
        _print_table(plugins)
    for blocker in namespace_blockers():
        print(f"warning: {blocker}", file=sys.stderr)
    return 1 if args.check and any(info.status == "broken" for info in plugins) else 0


def _checked() -> list[PluginInfo]:
    from collie_core.registry import LoadedPlugin, Registry

    with suppress(ImportError):  # what most plugins import anyway, so that their own time is measured
        importlib.import_module("collie_core.plugin")

    plugins = []
    for item in Registry().check():
        if not isinstance(item, LoadedPlugin):
            plugins.append(item)
            continue
        info = item.info
        plugins.append(info if info.status == "duplicate" else replace(info, status="ok"))
        if item.seconds > SLOW:
            print(
                f"note: importing {info.kind} {info.name!r} of {info.distribution} took {item.seconds:.1f} s",
                file=sys.stderr,
            )
    return plugins


def _print_table(plugins: list[PluginInfo]) -> None:
    header = ("kind", "name", "distribution", "status", "")
    rows = [
        (i.kind, i.name, f"{i.distribution} {i.version}", i.status, i.problem or i.summary) for i in plugins
    ]
    if sys.stdout.isatty():
        _print_rich(header, rows)
        return
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(4)]
    for row in [header, *rows]:
        cells = [cell.ljust(width) for cell, width in zip(row[:4], widths, strict=True)]
        print("  ".join([*cells, " ".join(row[4].split())]).rstrip())


def _print_rich(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    styles = {"ok": "green", "broken": "bold red", "duplicate": "yellow", "off": "dim"}
    table = Table(*header, box=None, header_style="bold")
    for row in rows:
        table.add_row(*(Text(cell, styles.get(cell, "") if cell is row[3] else "") for cell in row))
    Console().print(table)
