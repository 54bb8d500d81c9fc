"""What is installed, without importing it; and who may be chosen by which name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from collie_core.errors import PluginError
from collie_core.registry import Registry

ROOT = Path(__file__).parents[2]
MONITOR = """
from collie_core.hookspecs import hookimpl
class Plugin:
    collie_api = 1
    @hookimpl
    def collie_monitor(self, run):
        return "a monitor"
"""
Install = Callable[..., str]


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd="/",
        env={**os.environ, **environment},
    )


def test_the_cores_own_parts_come_through_its_entry_points() -> None:
    declared = tomllib.loads((ROOT / "collie_core/pyproject.toml").read_text())["project"]["entry-points"]
    listed = {
        (info.group, info.name, info.value)
        for info in Registry().plugins()
        if info.distribution == "collie-core"
    }
    assert listed == {
        (group, name, value) for group, items in declared.items() for name, value in items.items()
    }
    assert {("collie.layouts", "native"), ("collie.monitors", "console")} <= {item[:2] for item in listed}


def test_listing_imports_neither_plugins_nor_torch_nor_pydantic() -> None:
    result = run_python(
        "import sys, collie_core\n"
        "from collie_core.cli.main import main\n"
        "assert main(['plugins', '--json']) == 0\n"
        "heavy = 'torch pydantic transformers numpy rich collie_models collie_methods collie_monitors '\\\n"
        "        'collie_core.layouts collie_core.monitors'.split()\n"
        "assert not set(heavy) & set(sys.modules), set(heavy) & set(sys.modules)"
    )
    assert result.returncode == 0, result.stderr
    listed = json.loads(result.stdout)
    keys = ["kind", "group", "name", "distribution", "version", "summary", "status", "problem"]
    assert all(list(entry) == keys for entry in listed)
    assert ("optimizer", "lomo", "collie-lomo", "found") in {
        (entry["kind"], entry["name"], entry["distribution"], entry["status"]) for entry in listed
    }


def test_the_public_names_load_on_first_use() -> None:
    result = run_python(
        "import sys, collie_core\n"
        "assert not {'torch', 'pydantic', 'transformers'} & set(sys.modules)\n"
        "assert set(collie_core.__all__) <= set(dir(collie_core))\n"
        "assert collie_core.CollieConfig.__name__ == 'CollieConfig' and 'torch' not in sys.modules\n"
    )
    assert result.returncode == 0, result.stderr
    with pytest.raises(AttributeError, match="Triner"):
        import collie_core

        _ = collie_core.Triner


def test_a_strangers_plugin_is_found_with_its_summary(install: Install) -> None:
    distribution = install(MONITOR, name="jsonl")
    info = Registry().find("monitor", "jsonl")
    assert (info.distribution, info.version, info.status, info.problem) == (distribution, "2.5", "found", "")
    assert info.summary == f"{distribution} in one line"
    assert Registry().load("monitor", "jsonl").cls.__name__ == "Plugin"


def test_a_name_that_two_claim_is_chosen_by_distribution(install: Install) -> None:
    install(MONITOR, name="twice", distribution="first-dist")
    install(MONITOR, name="twice", distribution="second_dist")
    registry = Registry()
    assert {i.status for i in registry.plugins() if i.name == "twice"} == {"duplicate"}
    with pytest.raises(PluginError) as caught:
        registry.find("monitor", "twice")
    message = str(caught.value)
    assert (
        "claimed by 2 distributions" in message
        and "first-dist 2.5" in message
        and "second_dist 2.5" in message
    )
    assert "write first-dist:twice or second_dist:twice" in message
    assert registry.load("monitor", "Second-Dist:twice").info.distribution == "second_dist"
    with pytest.raises(
        PluginError, match="'third' has no monitor 'twice'; monitor 'twice' comes from first-dist, second"
    ):
        registry.find("monitor", "third:twice")


def test_the_allow_list_names_distributions_and_plugins(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = install(MONITOR, name="allowed")
    install(MONITOR, name="other")
    monkeypatch.setenv("COLLIE_PLUGINS", f"{allowed.upper().replace('-', '_')}, optimizer:adamw")
    registry = Registry()
    usable = {(i.kind, i.name) for i in registry.plugins() if i.status != "off"}
    assert usable == {("monitor", "allowed"), ("optimizer", "adamw")}
    with pytest.raises(
        PluginError, match="monitor 'other' of .* is switched off: .* COLLIE_PLUGINS=.*monitor:other"
    ):
        registry.find("monitor", "other")
    monkeypatch.setenv("COLLIE_PLUGINS", "")
    assert not any(info.status == "off" for info in Registry().plugins())


def test_one_of_two_claimants_may_be_switched_off(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(MONITOR, name="twice", distribution="first-dist")
    install(MONITOR, name="twice", distribution="second-dist")
    monkeypatch.setenv("COLLIE_PLUGINS", "first-dist")
    assert Registry().find("monitor", "twice").distribution == "first-dist"


def test_a_core_that_the_plugin_does_not_admit_is_told_from_metadata(install: Install) -> None:
    distribution = install("raise RuntimeError", requires=["collie-core[data]<0.1"])
    info = next(i for i in Registry().plugins() if i.name == "acme")
    assert info.status == "broken"
    with pytest.raises(PluginError) as caught:
        Registry().load("monitor", "acme")
    message = str(caught.value)
    assert "needs collie-core<0.1, but collie-core 0.1.0 is installed" in message
    assert f"{distribution} 2.5 (entry point acme = " in message and "fit together" in message


def test_damaged_metadata_disturbs_no_other_plugin(install: Install, site: Path) -> None:
    install(MONITOR, name="unreadable", requires=["collie-core ~ 0.1"])
    (site / "leftover-1.0.dist-info").mkdir()
    (site / "leftover-1.0.dist-info" / "entry_points.txt").write_text("[collie.monitors]\nleft = gone:Gone\n")
    registry = Registry()
    assert registry.load("monitor", "console").info.status == "found"
    with pytest.raises(PluginError, match="the metadata of its distribution is damaged"):
        registry.load("monitor", "left")
    with pytest.raises(PluginError, match="its requirement 'collie-core ~ 0.1' cannot be read"):
        registry.load("monitor", "unreadable")


@pytest.mark.parametrize(
    ("kind", "name", "expected"),
    [
        (
            "optimizer",
            "adamv",
            r"unknown optimizer 'adamv', did you mean 'adam'\?; installed optimizers: .*adamw",
        ),
        ("optimizer", "AdamW", "did you mean 'adamw'"),
        ("optimizer", "native", "unknown optimizer 'native': it is a layout, not an optimizer"),
        ("layout", "adamw", "it is an optimizer, not a layout"),
        (
            "monitor",
            "system",
            "monitor 'system' is not installed: it is planned as collie-system, which does not exist yet",
        ),
        ("monitor", "zzz", "unknown monitor 'zzz'; installed monitors: "),
        (
            "optimizer",
            "acme:adamw",
            "distribution 'acme' has no optimizer 'adamw'; optimizer 'adamw' comes from collie-core",
        ),
        ("model", "gpt9000", "unknown model 'gpt9000'"),
    ],
)
def test_unknown_names_get_the_nearest_and_the_way_to_get_them(kind: str, name: str, expected: str) -> None:
    with pytest.raises(PluginError, match=expected):
        Registry().find(kind, name, wildcard=False)


def test_a_wildcard_provider_serves_model_types_that_none_claims(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    distribution = install("", kind="model", name="*")
    monkeypatch.setenv("COLLIE_PLUGINS", f"collie-llama {distribution}")  # not collie-hf
    registry = Registry()
    assert registry.find("model", "gpt9000").name == "*"
    assert registry.find("model", "llama").name == "llama"


def test_a_closed_namespace_is_told_with_its_owner(tmp_path: Path) -> None:
    info = tmp_path / "rude-3.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rude\nVersion: 3.0\n")
    (info / "RECORD").write_text("collie_models/__init__.py,,\n")
    file = tmp_path / "collie_models" / "__init__.py"
    file.parent.mkdir()
    file.touch()
    listing = run_python("from collie_core.cli.main import main; main(['plugins'])", PYTHONPATH=str(tmp_path))
    expected = f"{file} of distribution rude 3.0 closes the shared namespace collie_models"
    assert expected in listing.stderr and "pip uninstall rude" in listing.stderr
    loading = run_python(
        "from collie_core.registry import Registry; Registry().load('model', 'llama')",
        PYTHONPATH=str(tmp_path),
    )
    assert loading.returncode != 0 and expected in loading.stderr


def test_the_generated_list_of_known_plugins_is_fresh() -> None:
    code = "import known_plugins; print(known_plugins.text(), end='')"
    fresh = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT / "tools"
    ).stdout
    assert fresh == (ROOT / "collie_core/known_plugins.json").read_text(), "run `make docs`"
