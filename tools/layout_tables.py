"""Write the tables of docs/layouts.md: what is refused, what ranks hold, which methods are tested where.

The tables stand between `<!-- generated: NAME ... -->` and `<!-- end of generated -->`.
Usage: python tools/layout_tables.py
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from collie_core import CollieConfig
from collie_core.errors import Refusal
from collie_core.layouts.explain import held
from collie_core.layouts.native import NativeLayoutPlugin
from collie_core.layouts.rules import RULES
from collie_core.registry import Registry
from collie_core.train.setup import checked_plugins

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "layouts.md"
MARKED = re.compile(r"(<!-- generated: (\w+)[^>]*-->\n).*?(<!-- end of generated -->)", re.DOTALL)
#: layouts whose holdings the page shows
SHOWN: tuple[dict[str, Any], ...] = (
    {},
    *({"dp_size": 4, "layout": {"zero_stage": stage}} for stage in range(4)),
    {"tp_size": 4},
    {"pp_size": 4},
    {"dp_size": 2, "tp_size": 2, "layout": {"zero_stage": 3}},
)


def rules() -> str:
    """What is refused, from the table that refuses it."""
    lines = ["| what | why | what works |", "|---|---|---|"]
    lines += [f"| `{rule.keys}` | {rule.reason} | {rule.advice} |" for rule in RULES if rule.applies]
    lines += ["", "When the model has been read:", "", "| what | why | what works |", "|---|---|---|"]
    lines += [f"| `{rule.keys}` | {rule.reason} | {rule.advice} |" for rule in RULES if not rule.applies]
    return "\n".join(lines) + "\n"


def holds() -> str:
    """What `--explain` says of some layouts."""
    lines = ["| | weights | gradients | optimizer states |", "|---|---|---|---|"]
    for sizes in SHOWN:
        rows = 4 if sizes.get("pp_size", 1) > 1 else 1
        train = {"micro_batch_size": 1, "gradient_accumulation_steps": rows}
        config = CollieConfig(model={"path": "model"}, train=train, **sizes)
        said = held(config, NativeLayoutPlugin.Options(**sizes.get("layout", {})))
        cells = [said[topic] for topic in ("weights", "gradients", "optimizer states")]
        lines.append(f"| {_title(sizes) or 'one process'} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def support() -> str:
    """Every installed optimizer and adapter: refused by its own check, tested by name, or accepted."""
    layouts, tests = _tests()
    every = {name: keys for name, keys in layouts.items() if name != "single"}
    groups: dict[tuple[str, str, str], list[str]] = {}
    registry = Registry()
    for kind, name in _methods():
        problems = {layout: _problem(kind, name, keys, registry) for layout, keys in every.items()}
        accepted = [layout for layout, problem in problems.items() if problem is None]
        why = sorted({problem for problem in problems.values() if problem is not None})
        tested = [
            f"`tests/layouts/{file}.py` ({_names([n for n in accepted if n in under], accepted)})"
            for file, methods, under in tests
            if name in methods
        ]
        key = (_names(accepted, list(every)), "; ".join(why), ", ".join(tested) or "none of its own")
        groups.setdefault(key, []).append(f"`{name}`")
    lines = [
        "Layouts, by the names that the tests give them: " + "; ".join(_described(every)) + ".",
        "",
        "| method | accepted under | of these run by | refused elsewhere, since |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {', '.join(names)} | {accepted} | {tested} | {why} |"
        for (accepted, why, tested), names in groups.items()
    ]
    return "\n".join(lines) + "\n"


def _methods() -> list[tuple[str, str]]:
    """(kind, name) of every optimizer and adapter that is installed, each once."""
    found = {(info.kind, info.name) for info in Registry().plugins()}
    return sorted(pair for pair in found if pair[0] in ("optimizer", "adapter"))


def _tests() -> tuple[dict[str, dict[str, Any]], list[tuple[str, list[str], list[str]]]]:
    """Keys of each layout, and (file, methods, layouts) of each test that trains with methods."""
    for folder in ("layouts", "train"):
        sys.path.insert(0, str(ROOT / "tests" / folder))
    jobs = importlib.import_module("layout_jobs")
    parity = importlib.import_module("test_parity")
    others = importlib.import_module("test_optimizers")
    adapters = importlib.import_module("test_adapters")
    quant = importlib.import_module("test_quant_layouts")
    layouts = {name: keys for name, (_, keys) in jobs.LAYOUTS.items()}
    return layouts, [
        ("test_parity", list(parity.INSTALLED), list(parity.MANY)),
        ("test_optimizers", list(others.OTHERS), list(others.UNDER)),
        ("test_adapters", adapters.METHODS, adapters.UNDER),
        ("test_quant_layouts", quant.METHODS, quant.UNDER),
    ]


def _problem(kind: str, name: str, keys: dict[str, Any], registry: Registry) -> str | None:
    """Why a method is refused under a layout; None: it is not."""
    on_top = ["lora"] if name in ("nf4", "int8") else []  # they train nothing themselves
    section: dict[str, Any] = {"adapters": [name, *on_top]}
    if kind == "optimizer":
        section = {"optimizer": {"name": name}}
    _, _, problems = checked_plugins(CollieConfig(model={"path": "model"}, **section, **keys), registry)
    reasons = [problem.reason if isinstance(problem, Refusal) else problem for problem in problems]
    return "; ".join(reasons) or None


def _names(some: list[str], every: list[str]) -> str:
    return "all" if some == every else ", ".join(f"`{name}`" for name in some)


def _described(layouts: dict[str, dict[str, Any]]) -> Iterator[str]:
    for name, keys in layouts.items():
        yield f"`{name}`: {_title(keys)}"


def _title(keys: dict[str, Any]) -> str:
    sizes = [f"{key} {keys[key]}" for key in ("dp_size", "tp_size", "pp_size") if keys.get(key, 1) > 1]
    return ", ".join([*sizes, *(f"{key} {value}" for key, value in keys.get("layout", {}).items())])


def text() -> str:
    """The document with fresh tables."""
    tables = {"rules": rules, "holds": holds, "support": support}
    return MARKED.sub(
        lambda found: f"{found[1]}\n{tables[found[2]]()}\n{found[3]}", DOCUMENT.read_text(encoding="utf-8")
    )


if __name__ == "__main__":
    DOCUMENT.write_text(text(), encoding="utf-8")
    print(DOCUMENT)
