"""`collie models`: families and checkpoints from declarations in source, importing no plugin and no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pluggy
import pytest

import collie_core
from collie_core.cli.main import main
from collie_core.registry.declarations import declared

Install = Callable[..., str]

STRANGER = '''
import no_such_library


class Plugin:
    """Acme's family.  More of it."""

    collie_api = 1
    supports = ("tp",)
    checkpoints: tuple = (
        {"name": "acme/acme-1b", "parameters": "1.0B", "licence": "Acme licence"},
        {"parameters": "2.0B"},
    )
'''


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert main(["models", *arguments, "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def test_no_plugin_and_no_torch_is_imported() -> None:
    code = (
        "import sys; from collie_core.cli.main import main; assert main(['models']) == 0; "
        "heavy = {'torch', 'transformers', 'pydantic', 'collie_models.llama', 'collie_models.hf'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "llama  LLaMA 1, 2 and 3, and OpenLLaMA" in done.stdout
    assert "Gemma Terms of Use" in done.stdout


def test_each_installed_family_is_told_with_what_it_declares(capsys: pytest.CaptureFixture[str]) -> None:
    families = {family["name"]: family for family in listed(capsys)}
    llama = families["llama"]
    assert (llama["status"], llama["distribution"]) == ("found", "collie-llama")
    assert {"flash", "tp", "pp"} <= set(llama["supports"])
    assert {"name": "openlm-research/open_llama_3b", "parameters": "3.4B"} in llama["checkpoints"]
    assert "export as llama" in families["internlm"]["supports"]
    assert "*" not in families and "hf" in families  # one plugin under two names
    for family in families.values():
        assert family["summary"] and family["supports"] and family["checkpoints"], family
        for checkpoint in family["checkpoints"]:
            assert set(checkpoint) <= {"name", "parameters", "licence"}
            assert checkpoint["name"].count("/") == 1 and checkpoint["parameters"].endswith("B")


def test_families_that_are_not_installed_come_from_the_generated_list(tmp_path: Path) -> None:
    """The core alone, without the site-packages folder that has the plugins' metadata."""
    for module in (collie_core, pluggy):
        (tmp_path / module.__name__).symlink_to(Path(module.__path__[0]))
    command = [sys.executable, "-S", "-c", "from collie_core.cli.main import main; main(['models'])"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "qwen3  Qwen3, the dense models\n  not installed: pip install collie-qwen\n" in done.stdout
    assert "internlm/internlm-chat-7b" in done.stdout and "\n*" not in done.stdout


def test_a_strangers_declarations_are_read_though_it_cannot_be_imported(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    distribution = install(STRANGER, kind="model", name="acme")
    [family] = listed(capsys, "acme")
    assert family["distribution"] == distribution and family["summary"] == "Acme's family.  More of it"
    assert family["supports"] == ["tp"]
    assert family["checkpoints"] == [
        {"name": "acme/acme-1b", "parameters": "1.0B", "licence": "Acme licence"}
    ]


def test_a_family_that_declares_nothing_or_wrongly_is_listed_all_the_same(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install("class Plugin:\n    checkpoints = make()\n    supports = 3\n", kind="model", name="bare")
    install("class Plugin(:\n", kind="model", name="torn")
    for name in ("bare", "torn"):
        [family] = listed(capsys, name)
        assert (family["checkpoints"], family["supports"]) == ([], [])


def test_an_unknown_family_gets_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "lama"]) == 2
    assert "no model family 'lama', did you mean 'llama'" in capsys.readouterr().err


def test_a_class_behind_another_module_is_found() -> None:
    assert declared("collie_models.llama:Llama").summary.startswith("LLaMA")
    assert declared("no_such_package:Plugin") == declared("json:NoSuchClass")
