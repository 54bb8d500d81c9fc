"""benchmarks/quality.py: data, verdicts, what the command prints; and its table in docs/methods.md."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from quality import METHODS, Result, main, table, verdict
from quality_task import SIZES, documents, held_out, tuning

DOCS = Path(__file__).parents[2] / "docs" / "methods.md"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "found.json"
    few = ["--steps", "2", "--pretraining-steps", "2", "--methods", "lomo+clip", "--factors", "1,3"]
    assert main(["--size", "tiny", *few, "--dtype", "float32", "--json", "--output", str(file)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(file.read_text())
    assert found["size"] == "tiny" and found["verdicts"] == {"lomo+clip": ""}
    rows = found["results"]
    assert [(row["method"], row["factor"], row["problem"]) for row in rows] == [
        ("lomo+clip", 1.0, ""),
        ("lomo+clip", 3.0, ""),
    ]
    assert [row["lr"] for row in rows] == pytest.approx([1e-1, 3e-1])
    assert rows[0]["loss"] != rows[1]["loss"] and all(0 <= row["accuracy"] <= 1 for row in rows)


def test_an_unknown_method_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--methods", "adamw,sgdd"])
    assert stopped.value.code == 2 and "unknown methods: sgdd" in capsys.readouterr().err


def test_held_out_questions_are_in_no_training() -> None:
    size = replace(SIZES["tiny"], pretraining_steps=100)
    asked = {record["messages"][0]["content"] for record in held_out(size, 0)}
    trained = {record["messages"][0]["content"] for record in tuning(size, 1)}
    assert len(asked) > 200 and not asked & trained
    stated = " ".join(document["text"] for document in documents(size, 2))
    assert not any(question in stated for question in asked)
    sums = [re.findall(r"\d+", question) for question in asked if question.startswith("Add ")]
    assert sums and not any(f" {a} + {b} =" in stated or f" {a} plus {b} is" in stated for a, b in sums)
    assert list(documents(size, 2)) == list(documents(size, 2))


def test_a_default_is_marked_where_a_neighbour_or_adamw_is_better() -> None:
    results = [
        Result("adamw", 1.0, 2e-5, accuracy=0.90),
        Result("sgd", 1.0, 1e-2, accuracy=0.89),
        Result("sgd", 3.0, 3e-2, accuracy=0.905),
        Result("lion", 1.0, 3e-6, accuracy=0.85),
        Result("lion", 3.0, 9e-6, accuracy=0.91),
        Result("adan", 1.0, 5e-5, accuracy=0.70),
        Result("lomo", 1.0, 1e-2, problem="diverged"),
        Result("lomo", 1 / 3, 3.3e-3, accuracy=0.5, loss=1.0, peak_bytes=2**21),
    ]
    found = [verdict(results, name) for name in ("adamw", "sgd", "lion", "adan", "lomo", "muon")]
    assert found == [
        ("", False),
        ("", False),
        ("better at 3 `lr`", False),
        ("below adamw", True),
        ("diverged", True),
        ("not run", False),
    ]
    assert "| `lion` | 3e-06 |  | 85.0% | 91.0% |  |  | better at 3 `lr` |" in table(results)


def test_the_table_in_the_docs_has_the_defaults() -> None:
    section = DOCS.read_text(encoding="utf-8").split("\n## Quality")[1].split("\n## ")[0]
    stated = dict(re.findall(r"^\| `([\w+]+)` \| ([0-9.e-]+) \|", section, re.MULTILINE))
    assert stated.keys() >= {"sgd", "lomo", "lomo+clip", "adalomo", "adamw", "lora", "qlora"}
    assert {name: float(lr) for name, lr in stated.items()} == pytest.approx(
        {name: METHODS[name].default_lr for name in stated}
    )
