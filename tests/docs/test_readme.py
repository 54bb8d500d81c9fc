"""Every command and snippet of README.md is run, in a folder that has what it names."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def snippets(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(scope="module")
def folder(tiny_llama: Path, records: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model, the data and the YAML file that README speaks of."""
    path = tmp_path_factory.mktemp("readme")
    shutil.copytree(tiny_llama, path / "open_llama_3b")
    (path / "data").mkdir()
    for name in ("train", "eval"):
        (path / "data" / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (path / "train.yaml").write_text(snippets("yaml")[0])
    return path


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"
    return done.stdout


def test_the_commands_run_in_order(folder: Path) -> None:
    [block] = [block for block in snippets("bash") if "collie train" in block]
    lines = block.splitlines()
    assert len(lines) == 6
    for line in lines:
        run([sys.executable, "-m", "collie_core", *shlex.split(line)[1:]], folder)
    assert (folder / "exported" / "config.json").is_file()
    assert (folder / "runs" / "demo" / "tensorboard").is_dir() and (
        folder / "runs" / "demo" / "metrics.csv"
    ).is_file()


def test_the_python_script_runs(folder: Path) -> None:
    [script] = snippets("python")
    code = [line for line in script.splitlines() if line]
    assert len(code) <= 12
    (folder / "script.py").write_text(script)
    run([sys.executable, "script.py"], folder)
    assert (folder / "copy" / "model.safetensors").is_file()


def test_the_yaml_is_short() -> None:
    [text] = snippets("yaml")
    assert len(text.splitlines()) <= 12


def test_the_make_targets_exist() -> None:
    for block in snippets("bash"):
        for line in block.splitlines():
            if line.startswith("make "):
                run(["make", "--dry-run", *line.split()[1:]], ROOT)


def test_the_installing_lines_name_our_distributions() -> None:
    built = {
        tomllib.loads(path.read_text())["project"]["name"] for path in ROOT.glob("collie_*/**/pyproject.toml")
    }
    built.add("collie-llm")
    lines = [
        line for block in snippets("bash") for line in block.splitlines() if line.startswith("pip install")
    ]
    assert lines
    for line in lines:
        assert {name for name in line.split() if name.startswith("collie-")} <= built


def test_the_plugin_snippet_has_known_groups() -> None:
    from collie_core.hookspecs import GROUPS

    [text] = snippets("toml")
    assert set(tomllib.loads(text)["project"]["entry-points"]) <= set(GROUPS.values())


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (ROOT / target).exists(), target


def test_the_transcript_is_that_of_the_quickstart() -> None:
    [transcript] = snippets("text")
    source = (ROOT / "examples" / "quickstart" / "run.py").read_text()
    headings = [
        line for line in transcript.splitlines() if line.startswith("== ") and "result after" not in line
    ]
    assert len(headings) >= 6
    assert all(line.removeprefix("== ") in source for line in headings)
    assert transcript.count("yes  ") == 3
