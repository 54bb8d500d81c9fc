"""What `collie models` and `collie methods` share: plugins, installed or not, all or one by name."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Protocol, TypeVar

from collie_core.errors import UserError, nearest

INSTALLED = ("found", "ok", "duplicate")


class Listed(Protocol):
    """An entry, a dataclass.  status: that of `collie plugins`, or `missing`."""

    @property
    def name(self) -> str: ...
    @property
    def status(self) -> str: ...
    @property
    def distribution(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def problem(self) -> str: ...


T = TypeVar("T", bound=Listed)


def show(
    args: argparse.Namespace, entries: Sequence[T], what: str, lines: Callable[[T], list[str]]
) -> int:
    """Print the entries, or those named `args.name`, as lines or, where `args.json`, as one JSON list.

    Raises UserError for a name that none has.
    """
    found = [entry for entry in entries if args.name in (None, entry.name)]
    if args.name is not None and not found:
        hint = nearest(args.name, [entry.name for entry in entries])
        raise UserError(f"no {what} {args.name!r}{hint}")
    if args.json:
        print(json.dumps([asdict(entry) for entry in found], indent=1))  # type: ignore[call-overload]
    else:
        print("\n".join(line for entry in found for line in lines(entry)))
    return 0


def state(entry: Listed) -> str:
    """Whether it is installed, and from where; or what is wrong with it."""
    if entry.status in INSTALLED:
        return f"installed ({entry.distribution} {entry.version})"
    if entry.status == "missing":
        return f"not installed: {entry.problem or f'pip install {entry.distribution}'}"
    return f"{entry.status} ({entry.distribution} {entry.version}): {entry.problem}"
