"""The families through whole runs: chats packed, trained, kept in a checkpoint, exported, read by others."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_checkpoints import golden_folder
from safetensors.torch import load_file

from collie_core import AutoModelForCausalLM, AutoTokenizer, CollieConfig, Trainer
from collie_core.cli.main import main
from collie_core.models.export import export_pretrained

RELATIVES = {"internlm": "llama", "internlm2": "llama", "moss": "codegen", "chatglm2": "glm", "chatglm": None}


def chats(path: Path, count: int = 40) -> Path:
    """Short chats of one or two rounds."""
    records: list[dict[str, Any]] = []
    for n in range(count):
        messages = [
            {"role": "user", "content": f"What is {n} + {n}?"},
            {"role": "assistant", "content": f"{2 * n}"},
        ]
        if n % 3 == 0:
            messages += [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
        records.append({"messages": messages})
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def config(model: Path, records: Path, out: Path, **changes: Any) -> CollieConfig:
    sections: dict[str, Any] = {
        "model": {"path": str(model), "dtype": "float32"},
        "optimizer": {"name": "lomo", "lr": 0.05, "clip_grad_norm": 1.0},
        "data": {"train": str(records), "eval": str(records), "max_length": 128, "packing": True},
        "train": {"micro_batch_size": 2, "max_steps": 4},
        "evaluate": {"every_steps": 2},
        "checkpoint": {"every_steps": 2},
        "monitors": [],
        "output_dir": str(out),
    }
    return CollieConfig(**{**sections, **changes})


@pytest.mark.parametrize("family", sorted(RELATIVES))
def test_trains_and_is_exported(family: str, tmp_path: Path) -> None:
    model = golden_folder(family, tmp_path / "model")
    run = tmp_path / "run"
    count, length = (12, 1024) if family == "moss" else (40, 128)  # its meta instruction has 600 tokens
    data = str(chats(tmp_path / "data.jsonl", count))
    sections = {"train": data, "eval": data, "max_length": length, "packing": True}
    Trainer(config(model, Path(data), run, data=sections)).train()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    perplexities = [line["perplexity/perplexity"] for line in lines if "perplexity/perplexity" in line]
    assert len(perplexities) == 2 and perplexities[1] < perplexities[0]
    assert all(math.isfinite(line["grad_norm"]) for line in lines if "loss" in line)
    trained = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    ids = torch.tensor([tokenizer("What is 3 + 4?")["input_ids"]])
    checkpoint = max((run / "checkpoints").iterdir())
    for number, source in enumerate((run, checkpoint)):
        out = tmp_path / f"plain_{number}"
        assert main(["export", str(source), str(out)]) == 0
        assert (
            load_file(out / "model.safetensors").keys()
            == load_file(run / "model" / "model.safetensors").keys()
        )
        again = AutoModelForCausalLM.from_pretrained(out)
        assert torch.equal(again(ids).logits, trained(ids).logits)
        relative = RELATIVES[family]
        if relative is None:
            assert main(["export", str(source), str(tmp_path / "refused"), "--as", "glm"]) == 2
            continue
        out = tmp_path / f"relative_{number}"
        assert main(["export", str(source), str(out), "--as", relative]) == 0
        stock = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=False).eval()
        theirs: Any = transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=False)
        assert theirs("What is 3 + 4?")["input_ids"] == ids[0].tolist()
        torch.testing.assert_close(stock(ids).logits, trained(ids).logits, atol=1e-4, rtol=1e-4)
        expected = stock.generate(ids, do_sample=False, max_new_tokens=10)
        found = trained.generate(ids, max_new_tokens=10)
        assert torch.equal(found, expected)
        texts = [t.decode(ids[0], skip_special_tokens=True) for t in (tokenizer, theirs)]
        assert texts[0].strip() == texts[1].strip() == "What is 3 + 4?"


@pytest.mark.parametrize("family", ["chatglm", "chatglm2"])
def test_packing_changes_no_loss(family: str, tmp_path: Path) -> None:
    model = golden_folder(family, tmp_path / "model")
    data = chats(tmp_path / "data.jsonl")
    losses = {}
    for packing in (True, False):
        sections = {"train": str(data), "eval": str(data), "max_length": 128, "packing": packing}
        run = tmp_path / f"packing_{packing}"
        train = {"micro_batch_size": 40, "epochs": 1}  # one step over everything, in either case
        Trainer(config(model, data, run, data=sections, train=train)).train()
        line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
        losses[packing] = (line["loss"], line["grad_norm"])
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)


def test_records_longer_than_the_positions_are_refused_before_the_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = golden_folder("chatglm2", tmp_path / "model")
    path, data = tmp_path / "train.yaml", chats(tmp_path / "data.jsonl")
    path.write_text(
        f"model: {{path: {model}, dtype: float32}}\noptimizer: {{name: lomo, lr: 0.1}}\n"
        f"data: {{train: {data}, max_length: 129}}\noutput_dir: {tmp_path / 'run'}\n"
    )
    assert main(["train", str(path)]) == 2
    assert "data.max_length: 129 is above the model's 128 positions" in capfd.readouterr().err


def test_a_later_export_replaces_folders_too(tmp_path: Path) -> None:
    """The chat templates of a tokenizer lie in a folder of their own."""
    source, out = golden_folder("moss", tmp_path / "model"), tmp_path / "out"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    origin = model.origin
    assert origin is not None
    for _ in range(2):
        named = [(name, parameter.detach()) for name, parameter in model.named_parameters()]
        configs = (origin.provider, origin.config, origin.hf_config)
        export_pretrained(out, *configs, named, source=source, tokenizer=tokenizer, replace=True)
    assert list((out / "additional_chat_templates").iterdir())
    assert AutoTokenizer.from_pretrained(out)("a b")["input_ids"] == tokenizer("a b")["input_ids"]
