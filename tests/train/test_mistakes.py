"""Bad input: exit status 2, one clear message, no traceback, and no output folder touched."""

from __future__ import annotations

import json
import pickle  # noqa: S403  (to write files that must be refused)
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from training_helpers import config, losses

from collie_core.cli.main import main

Mapping = dict[str, Any]


@pytest.fixture
def train(
    tiny_llama: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Run `collie train` on a changed config; returns exit status and stderr."""

    def run(*overrides: str, change: Callable[[Mapping], None] | None = None) -> tuple[int, str]:
        mapping = config(tiny_llama, data_file, tmp_path / "out").to_mapping()
        if change is not None:
            change(mapping)
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(mapping))
        status = main(["train", str(path), *overrides])
        return status, capsys.readouterr().err

    return run


def refused(result: tuple[int, str], out: Path, *expected: str) -> None:
    status, err = result
    assert status == 2, err
    for text in expected:
        assert text in err, err
    assert "Traceback" not in err
    assert not out.exists(), "the output folder was touched"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.epoks=2", ["train.epoks: unknown key, did you mean 'epochs'?"]),
        ("train.epochs=two", ["train.epochs: expected a whole number >= 1, got 'two'"]),
        ("train.global_batch_size=6", ["6 is no multiple of micro_batch_size 4"]),
        ("optimizer.name=sdg", ["sdg", "did you mean 'sgd'"]),
        ("optimizer={name: lomo, clip_mod: keep}", ["optimizer.clip_mod", "did you mean 'clip_mode'"]),
        ("optimizer={name: lomo, lrr: 1}", ["optimizer.lrr: unknown key, did you mean 'lr'?"]),
        ("optimizer={name: sgd, param_groups: [{params: nothing.*}]}", ["'nothing.*' matches no parameter"]),
        ("optimizer={name: lomo, clip_mode: kept}", ["optimizer.clip_mode", "did you mean 'keep'"]),
        ("monitors=[consol]", ["consol", "did you mean 'console'"]),
        ("layout={name: native, zero_stage: 7}", ["layout.zero_stage: expected 0 or 1 or 2 or 3, got 7"]),
        ("evaluate.evaluators=[perplexty]", ["did you mean 'perplexity'"]),
        (
            "evaluate.evaluators=[{name: perplexity, stride: 8}]",
            ["evaluate.evaluators.0.stride: unknown key: perplexity has no options"],
        ),
        (
            "evaluate.evaluators=[perplexity, perplexity]",
            ["evaluate.evaluators.1.name: 'perplexity' is there already"],
        ),
        ("train.activation_checkpointing=9", ["9 blocks, but the model has 2"]),
        ("train.trainable=[nothing.*]", ["'nothing.*' matches no parameter"]),
        (
            "optimizer.param_groups=[{params: ['*.nrom.*', 'model.norm.weight'], lr: 1e-3}]",
            ["optimizer.param_groups.0.params: '*.nrom.*' or 'model.norm.weight' matches no parameter"],
        ),
        ("adapters=[{name: lora, adapter_name: a/b}]", ["expected text that matches ^[A-Za-z0-9_-]+$"]),
        ("train.frozen=['*']", ["leaves no parameter to train"]),
        ("data.train=missing.jsonl", ["missing.jsonl"]),
        ("data.train=null", ["data.train: is required"]),
        ("data.train=[]", ["data.train: is required"]),
        ("model.path=/nowhere/at/all", ["/nowhere/at/all"]),
        ("model.provider=lama", ["lama", "llama"]),
        ("checkpoint.resume=/nowhere", ["checkpoint.resume: /nowhere is no folder"]),
        ("use_flash=true", ["use_flash"]),
        ("ops.attention=sdpaa", ["sdpaa"]),
    ],
)
def test_config_mistakes(
    train: Callable[..., tuple[int, str]], tmp_path: Path, override: str, expected: list[str]
) -> None:
    if override == "use_flash=true" and torch.cuda.is_available():
        expected = []
    refused(train(override), tmp_path / "out", *expected)


def test_every_wrong_plugin_is_told_at_once_with_its_key(
    train: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    refused(
        train(
            "optimizer=lommo", "monitors=[consol]", "evaluate.evaluators=[bleu]", "model.provider=lama"
        ),
        tmp_path / "out",
        "override 'model.provider=lama': model.provider: unknown model 'lama', did you mean 'llama'?",
        "override 'optimizer=lommo': optimizer.name: unknown optimizer 'lommo', did you mean 'lomo'?",
        "override 'monitors=[consol]': monitors.0.name: unknown monitor 'consol'",
        "override 'evaluate.evaluators=[bleu]': evaluate.evaluators.0.name: unknown evaluator 'bleu' (",
    )


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (['{"text": "fine"}', '{"text": '], [":2"]),
        (['{"text": "fine"}', '{"txt": "no"}'], [":2", "txt"]),
        (["[1, 2]"], [":1"]),
        ([], ["train.jsonl"]),
        (['{"tokens": [5, 6, 7], "labels": [-100, -100, -100]}'], [":1"]),
        (['{"tokens": [5, 6, 70000], "labels": [5, 6, 7]}'], [":1", "70000"]),
        (['{"tokens": [5, 6, 7], "labels": [5, 6]}'], [":1"]),
        (['{"input": 3, "output": "x"}'], [":1"]),
        (['{"messages": [{"role": "user", "content": "hi"}]}'], [":1"]),
        (
            [
                '{"messages": [{"role": "Assistent", "content": ""}, {"role": "assistant", "content": "a"}]}',
            ],
            [":1", "the role 'Assistent', did you mean 'assistant'?"],
        ),
    ],
)
def test_data_mistakes(
    train: Callable[..., tuple[int, str]],
    data_file: Path,
    tmp_path: Path,
    lines: list[str],
    expected: list[str],
) -> None:
    data_file.write_text("".join(line + "\n" for line in lines))
    refused(train(), tmp_path / "out", *expected)


@pytest.fixture
def damaged(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the model folder, to be damaged."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "damaged"))


def model_path(folder: Path) -> str:
    return f"model.path={folder}"


def test_missing_unexpected_and_misshaped_tensors(
    train: Callable[..., tuple[int, str]], damaged: Path, tmp_path: Path
) -> None:
    tensors = load_file(damaged / "model.safetensors")
    first = next(name for name in tensors if "q_proj" in name)
    without = {name: t for name, t in tensors.items() if name != first}
    save_file(without, damaged / "model.safetensors")
    refused(train(model_path(damaged)), tmp_path / "out", first)
    save_file({**tensors, "extra.weight": torch.zeros(2)}, damaged / "model.safetensors")
    refused(train(model_path(damaged)), tmp_path / "out", "extra.weight")
    save_file({**tensors, first: torch.zeros(3, 3)}, damaged / "model.safetensors")
    refused(train(model_path(damaged)), tmp_path / "out", first, "3")


@pytest.mark.parametrize("size", [4, 200, -1000])
def test_truncated_safetensors(
    train: Callable[..., tuple[int, str]], damaged: Path, tmp_path: Path, size: int
) -> None:
    path = damaged / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused(train(model_path(damaged)), tmp_path / "out", "model.safetensors")


class Payload:
    """A pickle that would create a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_a_poisoned_pickle_is_refused_and_not_executed(
    train: Callable[..., tuple[int, str]], damaged: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "executed"
    (damaged / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Payload(marker)}, damaged / "pytorch_model.bin")
    refused(train(model_path(damaged)), tmp_path / "out", "pytorch_model.bin")
    (damaged / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(marker)))
    refused(train(model_path(damaged)), tmp_path / "out", "pytorch_model.bin")
    assert not marker.exists()


def test_an_unsupported_model_config_is_refused_by_name(
    train: Callable[..., tuple[int, str]], damaged: Path, tmp_path: Path
) -> None:
    path = damaged / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "hidden_act": "sillu"}))
    refused(train(model_path(damaged)), tmp_path / "out", "hidden_act", "sillu")
    path.write_text(json.dumps({**content, "model_type": "lllama"}))
    refused(train(model_path(damaged)), tmp_path / "out", "lllama")
    path.write_text("{")
    refused(train(model_path(damaged)), tmp_path / "out", "config.json")


def test_a_missing_config_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["train", str(tmp_path / "no.yaml")]) == 2
    assert "no such config file" in capsys.readouterr().err


FULL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from collie_core import CollieConfig, Trainer
from collie_core.cli.main import main
from collie_core.plugin import hookimpl
from collie_core.config.load import load_config

class Fill:
    @hookimpl
    def collie_step_end(self, step):
        if step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

from collie_core.errors import CollieError
try:
    Trainer(load_config(sys.argv[1]), callbacks=[Fill()]).train()
except CollieError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_status)
"""


def test_a_full_disk_leaves_the_previous_checkpoint(
    tiny_llama: Path, data_file: Path, tmp_path: Path
) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    assert signal.SIGXFSZ
    out = tmp_path / "out"
    mapping = config(tiny_llama, data_file, out, checkpoint={"every_steps": 3}).to_mapping()
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(mapping))
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1, done.stderr
    assert "step 6" in done.stderr and "step_000003" in done.stderr and "Traceback" not in done.stderr
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step_000003"]
    assert main(["train", str(path)]) == 0  # with room again it goes on
    assert len(losses(out)) == 10


@pytest.mark.parametrize("optimizer", ["lomo", "sgd"])
def test_a_non_finite_loss_names_the_records(
    train: Callable[..., tuple[int, str]], tmp_path: Path, optimizer: str
) -> None:
    status, err = train(f"optimizer.name={optimizer}", "optimizer.lr=1e30")
    assert status == 1
    assert "not finite" in err and "train.jsonl:" in err and "on_nan: skip" in err
    assert "Traceback" not in err
    # the step left the weights as they were, so what was before it is there to go on from
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["step_000001"]
    status, err = train(f"optimizer.name={optimizer}", "optimizer.lr=1e30", "train.on_nan=skip")
    assert status == 0 and "the step was skipped" in err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["lomo", "adalomo", "adamw"])
def test_a_skipped_step_changes_nothing(
    tiny_llama: Path, data_file: Path, tmp_path: Path, optimizer: str, dtype: str
) -> None:
    from training_helpers import largest_difference, weights

    from collie_core import Trainer

    def nan_in_third(labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
        )
        return loss * float("nan") if len(calls) == 3 else loss

    calls: list[int] = []
    section = {"name": optimizer, "lr": 0.01}
    for name, steps in (("two", 2), ("three", 3)):
        calls.clear()
        cfg = config(
            tiny_llama,
            data_file,
            tmp_path / name,
            model={"dtype": dtype},
            optimizer=section,
            train={"max_steps": steps, "on_nan": "skip"},
        )
        Trainer(cfg, loss_fn=nan_in_third).train()
    assert largest_difference(weights(tmp_path / "two"), weights(tmp_path / "three")) == 0.0


def test_a_failing_allocation_ends_with_status_3(
    tiny_llama: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from collie_core import Trainer
    from collie_core.errors import OutOfMemory

    def greedy(logits: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("tried to allocate 80.00 GiB")

    with pytest.raises(OutOfMemory, match="micro_batch_size") as caught:
        Trainer(config(tiny_llama, data_file, tmp_path / "out"), loss_fn=greedy).train()
    assert caught.value.exit_status == 3


def test_memory_that_ends_outside_the_loop_ends_with_status_3_too(
    tiny_llama: Path, tmp_path: Path
) -> None:
    limit = resource.getrlimit(resource.RLIMIT_AS)
    code = (
        "import resource, sys, torch, transformers\n"
        "from collie_core.cli.main import main\n"
        "import collie_core.models.auto, collie_core.models.generation\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, resource.RLIM_INFINITY))\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    assert limit[1] == resource.RLIM_INFINITY
    big = tmp_path / "big"
    shutil.copytree(tiny_llama, big)
    content = json.loads((big / "config.json").read_text())
    (big / "config.json").write_text(json.dumps({**content, "vocab_size": 3_000_000}))
    tensors = load_file(big / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.zeros(3_000_000, 32)
    save_file(tensors, big / "model.safetensors")
    arguments = ["generate", str(big), "--prompt", "a", "--dtype", "bfloat16"]
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3, done.stderr
    assert done.stderr.startswith("error: out of memory: ") and "Traceback" not in done.stderr
