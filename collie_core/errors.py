"""The errors a user may see, each with the exit status of the command that ends with it.

A `CollieError` is printed as it is, without a traceback, so its text must name the file, line or key,
the value, what was expected and the cure.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class CollieError(Exception):
    """Base of all errors with a message written for the user; `exit_status` is that of the command."""

    exit_status = 1


class UserError(CollieError):
    """The user's mistake, or a refused combination: config, data, plugin, checkpoint or command line."""

    exit_status = 2


class ConfigError(UserError):
    """A configuration that cannot be used."""


class DataError(UserError):
    """A record, data file or data set that cannot be used."""


class PluginError(UserError):
    """A plugin that is unknown, not installed, broken, or claimed twice."""


class CheckpointError(UserError):
    """A model folder, weight file or checkpoint that is missing, damaged, unsafe or of another shape."""


class RunFailed(CollieError):
    """A run that began and could not go on (a non-finite loss, a full disk, a dead peer)."""


class OutOfMemory(CollieError):
    """The run does not fit in memory."""

    exit_status = 3


class Refusal(str):
    """A problem of `collie_check` that knows the nearest combination that works.

    As a text it is complete.  rule: the keys that do not go together; reason: why; instead: keys of the
    config with the values to give them, such as {"layout.zero_stage": 0}; advice: the same in words.
    """

    def __new__(
        cls, rule: str, reason: str, instead: Mapping[str, Any], advice: str, origin: str = ""
    ) -> Refusal:
        """origin: who refuses, in front of the text."""
        made = super().__new__(cls, f"{f'{origin}: ' if origin else ''}{rule}: {reason}; {advice}")
        made.rule, made.reason, made.instead, made.advice = rule, reason, dict(instead), advice
        return made

    rule: str
    reason: str
    instead: dict[str, Any]
    advice: str

    def of(self, origin: str) -> Refusal:
        """The same, said by `origin`."""
        return Refusal(self.rule, self.reason, self.instead, self.advice, origin)


def listed(names: Sequence[str], most: int = 20) -> str:
    """The names, but not more than so many of them."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def nearest(name: str, known: Iterable[str]) -> str:
    """`, did you mean 'x'?` for the known name closest to `name`, or an empty string."""
    near = difflib.get_close_matches(name, list(known), 1, 0.6)
    return f", did you mean {near[0]!r}?" if near else ""
