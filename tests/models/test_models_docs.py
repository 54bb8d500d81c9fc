"""docs/models.md: its commands and snippets run, and its tables are what the plugins do."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MistralConfig

from collie_core.cli.main import main
from collie_core.cli.models import families
from collie_core.config.schema import CollieConfig
from collie_core.models.provider import provider_for
from collie_core.registry.declarations import declared

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")


def snippets(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the two models that the page speaks of."""
    path = tmp_path_factory.mktemp("models_docs")
    cases = ROOT / "tests" / "golden" / "cases"
    shutil.copytree(cases / "internlm", path / "internlm-7b")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(cases / "tokenizer_internlm" / name, path / "internlm-7b")
    small = MistralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4
    )
    AutoModelForCausalLM.from_config(small).save_pretrained(path / "Mistral-7B-v0.1")
    return path


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whatever its files."""
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.bin"):
        found |= torch.load(path, weights_only=True)
    for path in folder.glob("model*.safetensors"):
        found |= load_file(path)
    return found


def test_the_commands_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    printed = []
    for line in [line for block in snippets("bash") for line in block.splitlines()]:
        assert main(shlex.split(line)[1:]) == 0, line
        printed.append(capsys.readouterr().out)
    listed, one, as_json = printed[:3]
    assert one in listed and one.startswith("internlm  InternLM\n")
    assert {"llama", "internlm", "hf"} <= {family["name"] for family in json.loads(as_json)}
    copied = tensors(folder / "internlm-copy")
    source = tensors(folder / "internlm-7b")
    assert copied.keys() == {name for name in source if not name.endswith(".inv_freq")}  # no parameters
    assert all(torch.equal(tensor, source[name]) for name, tensor in copied.items())
    relative = AutoModelForCausalLM.from_pretrained(folder / "internlm-as-llama")
    assert relative.config.model_type == "llama" and relative.dtype == torch.bfloat16


def test_the_models_load_as_shown(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    made: dict[str, Any] = {}
    exec(snippets("python")[0], made)
    assert type(made["stock"]).__name__ == "TransformersForCausalLM"
    assert "quick" in made["tokenizer"].decode(made["prompt"][0]) and capsys.readouterr().out.strip()
    section = re.search(r"`model: (\{path.*?\})`", TEXT)
    assert section
    path = folder / "train.yaml"
    path.write_text(f"model: {section[1]}\ndata: {{train: x.jsonl}}\n")
    assert CollieConfig.from_yaml(path).model.provider == "hf"


def test_the_table_of_families() -> None:
    rows = re.findall(r"^\| (`[^|]+`) \| `(collie-\w+)` \| ?([^|]*?) ?\|$", TEXT, re.MULTILINE)
    stated = {name: (row[1], row[2]) for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    own = {family.name: family for family in families() if family.distribution.startswith("collie-")}
    assert stated.keys() == own.keys() - {"hf"}
    for name, (distribution, relatives) in stated.items():
        family = own[name]
        assert family.distribution == distribution
        exports = [s.removeprefix("export as ") for s in family.supports if s.startswith("export as ")]
        assert name == "llama" or [relatives.replace("`", "")] == (exports or [""])


REFUSED: dict[str, dict[str, Any]] = {
    "that transformers does not implement": {"model_type": "no_such_model"},
    "encoder-decoders": {"model_type": "t5"},
    "mixtures of experts": {"model_type": "mixtral"},
    "alibi": {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "recurrent states": {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2},
    "`rope_type` `dynamic`": {"model_type": "llama", "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "`quantization_config`": {"model_type": "llama", "quantization_config": {"bits": 4}},
}


@pytest.mark.parametrize("what", sorted(REFUSED))
def test_what_is_said_to_be_refused_is(what: str) -> None:
    assert any(what in line for line in TEXT.splitlines() if line.startswith("| "))
    with pytest.raises(Exception, match="config|model_type|not supported") as caught:
        selected = provider_for(REFUSED[what], None, "hf")
        selected.provider.weight_map(selected.config)
    assert type(caught.value).__name__ == "ConfigError"


def test_the_class_that_is_shown_is_listed_from_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, source = snippets("python")
    (tmp_path / "acme_shown.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = declared("acme_shown:Acme")
    assert found.summary == "Acme's decoder" and found.supports == ("flash", "tp")
    assert [checkpoint["name"] for checkpoint in found.checkpoints] == ["acme/acme-1b"]
