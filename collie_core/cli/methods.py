"""`collie methods [NAME] [--json]`: optimizers and adapters, their cost, and what they go together with."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass

from collie_core.cli.listing import show, state
from collie_core.registry.declarations import Declarations, declared
from collie_core.registry.discovery import discover, known_plugins

KINDS = ("optimizer", "adapter")
#: bytes of an element
SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Method:
    """An optimizer or adapter plugin.  status: that of `collie plugins`, or `missing`; version: "" then.

    weights: bytes of a parameter of the model, by its dtype; of an adapter that packs the linears of the
    blocks, of a parameter of theirs, by options (those of the default: ""): all others are as they were.
    gradients: by the dtype, where a step is one micro-batch (several are summed in fp32, 4 bytes); an
    optimizer that uses each in the backward pass keeps none.
    states: by options, by what has them, as `hookspecs` says.
    An adapter's own parameters, few, have gradients and states as the optimizer says; the model's have none.
    """

    kind: str
    name: str
    status: str
    distribution: str
    version: str
    summary: str
    in_backward: bool
    weights: Mapping[str, float]
    gradients: Mapping[str, float]
    states: Mapping[str, Mapping[str, float]]
    supports: tuple[str, ...]
    problem: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("name", nargs="?", help="only this method")
    parser.add_argument("--json", action="store_true", help="print one JSON list")


def run(args: argparse.Namespace) -> int:
    """Print the methods.  Raises UserError for a name that none has."""
    return show(args, methods(), "optimizer or adapter", _lines)


def methods() -> list[Method]:
    """Installed optimizers and adapters by name, then those of this project that are not; nothing is
    imported."""
    installed = []
    for info in discover():
        if info.kind in KINDS:
            found = declared(info.value)
            summary = found.summary or info.summary
            known = (info.kind, info.name, info.status, info.distribution, info.version, summary)
            installed.append(_method(known, found, info.problem))
    present = {(method.kind, method.name) for method in installed}
    missing = []
    for plugin in known_plugins():
        if plugin.kind in KINDS and (plugin.kind, plugin.name) not in present:
            found = Declarations(
                supports=tuple(plugin.supports),
                in_backward=plugin.in_backward,
                state_bytes=plugin.state_bytes,
                weight_bytes=plugin.weight_bytes,
            )
            known = (plugin.kind, plugin.name, "missing", plugin.distribution, "", plugin.summary)
            missing.append(_method(known, found, "" if plugin.released else "planned"))
    order = sorted(installed, key=lambda method: (KINDS.index(method.kind), method.name))
    return order + sorted(missing, key=lambda method: (KINDS.index(method.kind), method.name))


def _method(known: tuple[str, str, str, str, str, str], found: Declarations, problem: str) -> Method:
    kept = not found.in_backward and known[0] == "optimizer"
    return Method(
        *known,
        in_backward=found.in_backward,
        weights=found.weight_bytes or SIZES,
        gradients=SIZES if kept else dict.fromkeys(SIZES, 0),
        states=found.state_bytes,
        supports=found.supports,
        problem=problem,
    )


def _lines(method: Method) -> list[str]:
    """The method, what it costs, and what it goes together with."""
    lines = [f"{method.name}  {method.summary}", f"  {method.kind}, {state(method)}"]
    weights = "weights 2 bytes a parameter (4 in float32)"
    if method.weights != SIZES:
        lines.append(f"  {weights}, but those of the blocks' linears {_by_options(method.weights)}")
    elif method.kind == "adapter":
        lines.append(f"  {weights}; gradients and states of what it adds alone, as the optimizer says")
    else:
        gradients = "none kept" if method.in_backward else "2 (4)"
        option = "; none with in_backward: true" if "in_backward" in method.supports else ""
        lines.append(f"  {weights}, gradients {gradients}{option}")
        lines += [
            f"  states{f' with {options}' if options else ''}: {_sizes(sizes)}"
            for options, sizes in method.states.items()
        ]
    if method.supports:
        lines.append(f"  goes with {', '.join(method.supports)}")
    return lines


def _by_options(sizes: Mapping[str, float]) -> str:
    return ", ".join(f"{size:.5g}{f' with {options}' if options else ''}" for options, size in sizes.items())


def _sizes(sizes: Mapping[str, float]) -> str:
    if not any(sizes.values()):
        return "none"
    articles = {what: "an" if what.startswith(("element", "other")) else "a" for what in sizes}
    return ", ".join(f"{size:.3g} bytes {articles[what]} {what}" for what, size in sizes.items())
