"""Refused combinations: the message, `config check --explain`, and that what it proposes is accepted."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from collie_core.cli.main import main
from collie_core.layouts.rules import RULES

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
model: {path: ./model, dtype: float32}
optimizer: {name: adamw, lr: 1.0e-3}
data: {train: train.jsonl}
train: {micro_batch_size: 4, gradient_accumulation_steps: 2}
"""
#: keys of a rule -> overrides that it refuses
REFUSED: dict[str, list[list[str]]] = {
    "layout.pp_partition with pp_size": [
        ["pp_size=2", "layout.pp_partition=[1, 2, 3]"],
        ["pp_size=2", "layout.pp_partition=[0, 2]"],
        ["pp_size=2", "layout.pp_schedule=interleaved", "layout.pp_partition=[2, 2]"],
    ],
    "layout.pp_microbatches": [["pp_size=2", "layout.pp_microbatches=0"]],
    "layout.pp_stretches with layout.pp_schedule: interleaved": [
        ["pp_size=2", "layout.pp_schedule=interleaved", "layout.pp_stretches=1"]
    ],
    "layout.sequence_parallel: true with tp_size: 1": [["layout.sequence_parallel=true", "dp_size=2"]],
    "layout.offload: cpu with train.compile: true": [
        ["layout.offload=cpu", "train.compile=true"],
        ["dp_size=2", "layout.offload=cpu", "layout.zero_stage=2", "train.compile=true"],
    ],
    "layout.offload: cpu with layout.zero_stage: 0 and dp_size above 1": [
        ["dp_size=2", "layout.offload=cpu"]
    ],
    "optimizer with tp_size or layout.zero_stage": [
        ["optimizer.name=adafactor", "tp_size=2"],
        ["optimizer.name=adafactor", "dp_size=2", "layout.zero_stage=1"],
        ["optimizer.name=adafactor", "dp_size=2", "tp_size=2", "layout.zero_stage=3"],
    ],
}
CASES = [(keys, overrides) for keys, many in REFUSED.items() for overrides in many]


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "train.yaml"
    path.write_text(CONFIG)
    return str(path)


def explained(
    capsys: pytest.CaptureFixture[str], status: int, config: str, *overrides: str
) -> dict[str, Any]:
    assert main(["config", "check", config, "--explain", "--json", *overrides]) == status
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_every_rule_has_a_case() -> None:
    before_the_model = {rule.keys for rule in RULES if rule.applies is not None}
    assert before_the_model == REFUSED.keys() - {"optimizer with tp_size or layout.zero_stage"}
    assert all((rule.applies is None) == (rule.instead is None) for rule in RULES)


@pytest.mark.parametrize(("keys", "overrides"), CASES)
def test_a_refusal_names_rule_reason_and_what_works(
    keys: str, overrides: list[str], config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = explained(capsys, 2, config, *overrides)
    assert not found["accepted"]
    [refused] = [one for one in found["refused"] if one["rule"] == keys]
    assert refused["reason"] and refused["advice"] and refused["instead"].items() <= found["works"].items()
    changes = [f"{key}={json.dumps(value)}" for key, value in found["works"].items()]
    assert explained(capsys, 0, config, *overrides, *changes)["accepted"]
    assert main(["config", "check", config, *overrides]) == 2
    message = capsys.readouterr().err
    assert f"{keys}: {refused['reason']}; {refused['advice']}" in message


def test_refusals_of_several_plugins_are_resolved_together(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["optimizer.name=adafactor", "tp_size=2", "layout.sequence_parallel=true"]
    found = explained(capsys, 2, config, *overrides)
    assert len(found["refused"]) == 1  # with tp_size 1 sequence parallelism is refused in its turn
    assert found["works"] == {"tp_size": 1, "layout.sequence_parallel": "auto"}


def test_the_text_of_a_refusal(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", config, "--explain", "layout.sequence_parallel=true"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "refused: layout.sequence_parallel: true with tp_size: 1"
    assert lines[-1] == "nearest combination that works: layout.sequence_parallel=auto"


def test_a_problem_without_a_cure_is_told_too(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = explained(capsys, 2, config, "optimizer.name=rprop", "optimizer.weight_decay=0.1")
    assert found["works"] is None and "has no weight decay" in found["refused"][0]["reason"]


def test_an_accepted_config_says_what_each_rank_holds(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = explained(capsys, 0, config, "dp_size=2", "tp_size=2", "layout.zero_stage=3")
    assert found["accepted"] and found["works"] is None and found["refused"] == []
    said = found["explanation"]
    assert said["step"]["global batch"].endswith("4 x accumulation 2 x dp_size 2 = 16 rows")
    [layout] = [topics for origin, topics in said.items() if "layout" in origin]
    assert layout["processes"].endswith("= 4")
    assert "1/2 of every matrix" in layout["weights"] and "(1 bytes per" in layout["weights"]
    assert "(1 bytes per" in layout["gradients"] and "1/4" in layout["optimizer states"]


@pytest.mark.parametrize(
    ("overrides", "weights", "offload"),
    [
        (["layout.zero_stage=3"], "all of the model (4", "a block's, each time it runs"),
        (["dp_size=2", "layout.zero_stage=2"], "1/2 (zero_stage 2)", "all, from forward to backward"),
        (["dp_size=2", "layout.zero_stage=3"], "1/2 (zero_stage 3)", "a block's, each time it runs"),
    ],
)
def test_what_is_held_under_offload(
    overrides: list[str], weights: str, offload: str, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = explained(capsys, 0, config, "layout.offload=cpu", *overrides)["explanation"]
    [layout] = [topics for origin, topics in said.items() if "layout" in origin]
    assert weights in layout["weights"] and offload in layout["offload"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "8 rows a rank and step in 2 micro-batches of 4 rows; activations of at most 2, 1 of them"),
        (["layout.pp_schedule=gpipe"], "activations of at most 2, 2 of them"),
        (["layout.pp_microbatches=5"], "in 5 micro-batches of 1 to 2 rows; activations of at most 2, 1"),
        (["layout.pp_microbatches=50"], "in 8 micro-batches of 1 rows"),
        (["dp_size=2"], "8 rows a rank"),
        (["train.micro_batch_size=1"], "2 rows a rank and step in 2 micro-batches"),
    ],
)
def test_the_micro_batches_of_the_pipeline(
    overrides: list[str], expected: str, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = explained(capsys, 0, config, "pp_size=2", *overrides)["explanation"]
    [layout] = [topics for origin, topics in said.items() if "layout" in origin]
    assert expected in layout["pipeline"]


def test_the_tables_of_the_page_are_fresh() -> None:
    tables = runpy.run_path(str(ROOT / "tools" / "layout_tables.py"))
    page = (ROOT / "docs" / "layouts.md").read_text(encoding="utf-8")
    assert page == tables["text"](), "run `make docs`"
    assert all(f"| `{rule.keys}` |" in page for rule in RULES)
