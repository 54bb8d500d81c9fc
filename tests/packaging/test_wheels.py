"""Every folder's wheel is whole, licensed, typed and closes no namespace."""

from __future__ import annotations

import re
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging_environments import PROJECTS, ROOT

import collie_core

NOT_SHIPPED = {"pyproject.toml", "LICENSE", "README.md"}
PLUGINS = [project for project in PROJECTS if project.name != "collie_core"]


def metadata(project: Path) -> dict[str, object]:
    found: dict[str, object] = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    return found


def contents(wheels: Path, project: Path) -> dict[str, bytes]:
    (wheel,) = wheels.glob(f"{str(metadata(project)['name']).replace('-', '_')}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize("project", PROJECTS, ids=lambda project: project.name)
def test_a_wheel_holds_every_file_of_its_folder(project: Path, wheels: Path) -> None:
    expected = {
        str(file.relative_to(ROOT))
        for file in project.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts and file.name not in NOT_SHIPPED
    }
    found = {name for name in contents(wheels, project) if ".dist-info/" not in name}
    assert found == expected
    assert f"{project.relative_to(ROOT)}/py.typed" in found


@pytest.mark.parametrize("project", [*PROJECTS, ROOT], ids=lambda project: project.name)
def test_a_wheel_carries_the_licence(project: Path, wheels: Path) -> None:
    files = contents(wheels, project)
    (name,) = [name for name in files if name.endswith(".dist-info/licenses/LICENSE")]
    assert files[name] == (ROOT / "LICENSE").read_bytes() and b"Apache License" in files[name]
    assert metadata(project)["license"] == "Apache-2.0"


def test_no_wheel_closes_a_namespace(wheels: Path) -> None:
    for project in PROJECTS:
        top = {name for name in contents(wheels, project) if re.fullmatch(r"collie_\w+/__init__\.py", name)}
        assert top <= {"collie_core/__init__.py"}, project


def test_folders_of_modules_are_packages() -> None:
    for file in (ROOT / "collie_core").rglob("*.py"):
        assert (file.parent / "__init__.py").is_file(), f"{file.parent} has no __init__.py"


@pytest.mark.parametrize("project", PLUGINS, ids=lambda project: project.name)
def test_a_plugin_admits_a_bounded_range_of_cores(project: Path) -> None:
    dependencies = metadata(project)["dependencies"]
    assert isinstance(dependencies, list) and "collie-core>=0.1,<0.2" in dependencies


def test_versions_agree() -> None:
    assert {metadata(project)["version"] for project in [*PROJECTS, ROOT]} == {collie_core.__version__}


def test_the_meta_distribution_names_every_other_one(wheels: Path) -> None:
    root = metadata(ROOT)
    extras = root["optional-dependencies"]
    assert isinstance(root["dependencies"], list) and isinstance(extras, dict)
    named = {
        str(name).split("==")[0].split("[")[0] for name in [*root["dependencies"], *sum(extras.values(), [])]
    }
    assert named - {"collie-llm"} == {metadata(project)["name"] for project in PROJECTS}
    assert not [name for name in contents(wheels, ROOT) if name.endswith(".py")]


def test_set_up_installs_every_distribution_and_pins_every_library() -> None:
    requirements = (ROOT / "requirements-dev.txt").read_text()
    for project in PROJECTS:
        assert re.search(rf"^-e \./{project.relative_to(ROOT)}(\[data\])?$", requirements, re.MULTILINE), (
            project
        )
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    needed = [str(name) for project in PROJECTS for name in metadata(project)["dependencies"]]  # type: ignore[attr-defined]
    libraries = {re.split(r"[<>=\[]", name)[0].lower().replace("_", "-") for name in needed}
    assert {name for name in libraries if not name.startswith("collie-")} <= pinned
