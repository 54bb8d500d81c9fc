"""Write the tables of hooks and interfaces in docs/plugins.md from collie_core/hookspecs.py.

The tables stand between `<!-- generated ... -->` and `<!-- end of generated -->`.
Usage: python tools/hook_tables.py
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from collie_core import hookspecs

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "plugins.md"
MARKED = re.compile(r"(<!-- generated[^>]*-->\n).*?(<!-- end of generated -->)", re.DOTALL)


def tables() -> str:
    """All tables, as Markdown."""
    hooks = {name: value for name, value in vars(hookspecs).items() if name.startswith("collie_")}
    factories = {name: hooks[name] for name in hookspecs.REQUIRED_HOOK.values()}
    kinds = {hook: kind for kind, hook in hookspecs.REQUIRED_HOOK.items()}
    events = {name: hook for name, hook in hooks.items() if name not in factories and name != "collie_check"}
    parts = [
        "### What one selected plugin is asked for",
        "",
        "| kind | hook | returns | |",
        "|---|---|---|---|",
    ]
    parts += [
        f"| {kinds[name]} | `{name}({arguments(hook)})` | `{returns(hook)}` | {summary(hook)} |"
        for name, hook in factories.items()
    ]
    check = hooks["collie_check"]
    parts += ["", "### What every selected plugin is asked and told", "", "| hook | |", "|---|---|"]
    parts += [f"| `collie_check({arguments(check)})` | {summary(check)} |"]
    parts += [f"| `{name}({arguments(hook)})` | {summary(hook)} |" for name, hook in events.items()]
    for name in dict.fromkeys(returns(hook) for hook in factories.values()):
        parts += ["", *interface(getattr(hookspecs, name))]
    return "\n".join(parts) + "\n"


def interface(protocol: type) -> list[str]:
    """The table of one of the interfaces that factories return."""
    rows = [f"### {protocol.__name__}", "", (inspect.getdoc(protocol) or "").strip(), ""]
    rows += ["| member | |", "|---|---|"]
    attributes = ", ".join(f"`{name}`" for name in inspect.get_annotations(protocol))
    rows += [f"| {attributes} | attributes |"] if attributes else []
    for name, member in vars(protocol).items():
        if isinstance(member, property):
            rows.append(f"| `{name}` | {summary(member)} |")
        elif inspect.isfunction(member) and not name.startswith("_"):
            rows.append(f"| `{name}({arguments(member)})` | {summary(member)} |")
    return rows


def arguments(function: Callable[..., Any]) -> str:
    """The arguments' names, without `self`."""
    return ", ".join(name for name in inspect.signature(function).parameters if name != "self")


def returns(function: Callable[..., Any]) -> str:
    """The name of what a factory returns."""
    return str(inspect.signature(function).return_annotation)


def summary(documented: object) -> str:
    """The first paragraph of a docstring in one line."""
    return " ".join((inspect.getdoc(documented) or "").partition("\n\n")[0].split()).replace("|", "\\|")


def text() -> str:
    """The document with fresh tables."""
    return MARKED.sub(
        lambda found: f"{found[1]}\n{tables()}\n{found[2]}", DOCUMENT.read_text(encoding="utf-8")
    )


if __name__ == "__main__":
    DOCUMENT.write_text(text(), encoding="utf-8")
    print(DOCUMENT)
