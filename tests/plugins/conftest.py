"""A folder on the path that strangers' distributions are installed into, as pip would leave them."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

_numbers = itertools.count()


def write_distribution(
    site: Path,
    name: str,
    entry_points: Mapping[str, Mapping[str, str]],
    *,
    version: str = "1.0",
    requires: Sequence[str] = ("collie-core>=0.1,<0.2",),
    files: Mapping[str, str] | None = None,
) -> None:
    """Write `files` and a dist-info folder; entry_points maps group -> {name: value}."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = [f"Requires-Dist: {requirement}\n" for requirement in requires]
    summary = f"Summary: {name} in one line\n"
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{summary}{''.join(lines)}"
    )
    sections = [
        "\n".join([f"[{group}]", *(f"{k} = {v}" for k, v in items.items())])
        for group, items in entry_points.items()
    ]
    (info / "entry_points.txt").write_text("\n\n".join(sections) + "\n")
    for path, text in (files or {}).items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(text)
    record = [f"{path},," for path in [*(files or {}), f"{info.name}/METADATA"]]
    (info / "RECORD").write_text("\n".join(record) + "\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder at the front of the path; modules imported from it are forgotten afterwards."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delenv("COLLIE_PLUGINS", raising=False)
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def install(site: Path) -> Callable[..., str]:
    """`install(source, kind=..., name=...)` installs a one-plugin distribution whose class is `Plugin`."""
    groups = {
        "model": "collie.models",
        "layout": "collie.layouts",
        "optimizer": "collie.optimizers",
        "adapter": "collie.adapters",
        "monitor": "collie.monitors",
        "plugin": "collie.plugins",
    }

    def make(
        source: str,
        *,
        kind: str = "monitor",
        name: str = "acme",
        distribution: str = "",
        requires: Sequence[str] = ("collie-core>=0.1,<0.2",),
    ) -> str:
        module = f"acme_module_{next(_numbers)}"
        distribution = distribution or f"dist-{module.replace('_', '-')}"
        write_distribution(
            site,
            distribution,
            {groups[kind]: {name: f"{module}:Plugin"}},
            version="2.5",
            requires=requires,
            files={f"{module}.py": source},
        )
        return distribution

    return make
