"""The step: parity with a plain loop, accumulation, clipping, recomputation, memory, precision."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from training_helpers import config, largest_difference, losses, metrics, weights

from collie_core import Trainer
from collie_core.errors import UserError
from collie_core.plugin import hookimpl


def run(model: Path, data: Path, out: Path, /, **changes: Any) -> Path:
    Trainer(config(model, data, out, **changes)).train()
    return out


def plain_loop(
    model_path: Path, records: list[dict[str, str]], order: list[list[int]], lr: float, clip: float | None
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """transformers and torch.optim.SGD on the same records in the same order."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = LlamaForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    found = []
    for step in order:
        total, count = torch.zeros(()), 0
        for index in step:
            record = records[index]
            encoded = tokenizer(record["input"] + record["output"], return_offsets_mapping=True)
            ids = [*encoded["input_ids"], tokenizer.eos_token_id][:64]
            start = len(record["input"])
            trained = [end > start for _, end in encoded["offset_mapping"]] + [True]
            labels = [token if flag else -100 for token, flag in zip(ids, trained, strict=False)]
            logits = model(torch.tensor([ids])).logits[0, :-1]
            target = torch.tensor(labels[1:])
            total = total + torch.nn.functional.cross_entropy(
                logits, target, ignore_index=-100, reduction="sum"
            )
            count += int((target != -100).sum())
        (total / count).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(total) / count)
    return found, dict(model.state_dict())


class Order:
    """Notes which records every step trained."""

    def __init__(self) -> None:
        self.steps: list[list[int]] = []

    def note(self, batch: Any) -> None:
        self.steps.append(
            [int(o.rsplit(":", 1)[1]) - 1 for m in batch.micro_batches for row in m.records for o in row]
        )


def seen_order(model: Path, data: Path, out: Path, /, **changes: Any) -> list[list[int]]:
    """The records of every step of an epoch, from the reader itself."""
    from collie_core.train.setup import open_training

    order = Order()
    with open_training(Trainer(config(model, data, out, **changes))) as session:
        for batch in session.reader:
            if batch.step > session.run.total_steps:
                break
            order.note(batch)
    return order.steps


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("optimizer", ["sgd", "lomo"])
def test_training_equals_a_plain_loop(
    tiny_llama: Path,
    data_file: Path,
    records: list[dict[str, str]],
    tmp_path: Path,
    optimizer: str,
    clip: float | None,
) -> None:
    section = {"name": optimizer, "lr": 0.1, "clip_grad_norm": clip, "weight_decay": 0.0}
    out = run(tiny_llama, data_file, tmp_path / "out", optimizer=section)
    order = seen_order(tiny_llama, data_file, tmp_path / "order", optimizer=section)
    expected, parameters = plain_loop(tiny_llama, records, order, 0.1, clip)
    assert len(expected) == 10
    assert losses(out) == pytest.approx(expected, rel=2e-6)
    assert largest_difference(weights(out), parameters) < 1e-6


@pytest.mark.parametrize("optimizer", ["adamw", "lomo", "adalomo"])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_accumulation_changes_nothing(
    tiny_llama: Path, data_file: Path, tmp_path: Path, optimizer: str, clip: float | None
) -> None:
    lr = 1e-4 if optimizer == "adamw" else 0.01
    section = {"name": optimizer, "lr": lr, "clip_grad_norm": clip}
    # 40 records in steps of 16: the last step has 8, so 8 x 1 micro-batches against 1
    whole = run(
        tiny_llama, data_file, tmp_path / "a", optimizer=section, train={"micro_batch_size": 16, "epochs": 2}
    )
    parts = run(
        tiny_llama,
        data_file,
        tmp_path / "b",
        optimizer=section,
        train={"micro_batch_size": 1, "global_batch_size": 16, "epochs": 2},
    )
    assert len(losses(whole)) == 6
    assert losses(parts) == pytest.approx(losses(whole), rel=2e-6)
    bound = 1e-6 if optimizer == "lomo" else 1e-2 * lr * 6 if optimizer == "adamw" else 2e-5
    assert largest_difference(weights(whole), weights(parts)) < bound


@pytest.mark.parametrize("clip_mode", ["two_pass", "keep"])
def test_clip_modes_equal_ordinary_clipping(
    tiny_llama: Path, data_file: Path, tmp_path: Path, clip_mode: str
) -> None:
    sgd = {"name": "sgd", "lr": 0.1, "clip_grad_norm": 0.3, "clip_grad_value": 0.02}
    lomo = {**sgd, "name": "lomo", "clip_mode": clip_mode}
    one = run(tiny_llama, data_file, tmp_path / "sgd", optimizer=sgd)
    other = run(tiny_llama, data_file, tmp_path / "lomo", optimizer=lomo)
    assert [m["grad_norm"] for m in metrics(other)] == pytest.approx(
        [m["grad_norm"] for m in metrics(one)], rel=1e-5
    )
    assert losses(other) == pytest.approx(losses(one), rel=2e-6)
    assert largest_difference(weights(one), weights(other)) < 1e-6


@pytest.mark.parametrize("mode", ["full", "selective", "offload", 1])
def test_recomputation_changes_nothing(
    tiny_llama: Path, data_file: Path, tmp_path: Path, mode: str | int
) -> None:
    section = {"name": "lomo", "lr": 0.1}
    plain = run(
        tiny_llama,
        data_file,
        tmp_path / "a",
        optimizer=section,
        train={"max_steps": 4, "activation_checkpointing": "none"},
    )
    other = run(
        tiny_llama,
        data_file,
        tmp_path / "b",
        optimizer=section,
        train={"max_steps": 4, "activation_checkpointing": mode},
    )
    assert losses(other) == losses(plain)
    assert largest_difference(weights(plain), weights(other)) == 0.0


class LiveGradients:
    """Counts gradients alive at every parameter's hook."""

    def __init__(self) -> None:
        self.most = 0

    @hookimpl
    def collie_model_loaded(self, model: torch.nn.Module) -> None:
        parameters = list(model.parameters())

        def count(parameter: torch.Tensor) -> None:
            self.most = max(self.most, sum(p.grad is not None for p in parameters))

        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(count)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_lomo_keeps_at_most_three_gradients_alive(
    tiny_llama: Path, data_file: Path, tmp_path: Path, clip: float | None
) -> None:
    counter = LiveGradients()
    section = {"name": "lomo", "lr": 0.1, "clip_grad_norm": clip, "clip_mode": "two_pass"}
    cfg = config(tiny_llama, data_file, tmp_path / "out", optimizer=section, train={"max_steps": 2})
    Trainer(cfg, callbacks=[counter]).train()
    assert counter.most <= 3
    ordinary = LiveGradients()
    Trainer(
        config(tiny_llama, data_file, tmp_path / "sgd", train={"max_steps": 1}), callbacks=[ordinary]
    ).train()
    assert ordinary.most > 15  # the counter can tell


@pytest.mark.parametrize("optimizer", ["lomo", "adalomo", "adamw"])
def test_bfloat16_learns_as_float32(
    tiny_llama: Path, data_file: Path, tmp_path: Path, optimizer: str
) -> None:
    lr = {"lomo": 0.1, "adalomo": 0.02, "adamw": 2e-3}[optimizer]
    runs = {
        dtype: losses(
            run(
                tiny_llama,
                data_file,
                tmp_path / dtype,
                model={"dtype": dtype},
                optimizer={"name": optimizer, "lr": lr},
                train={"epochs": 4},
            )
        )
        for dtype in ("float32", "bfloat16")
    }
    assert runs["float32"][-1] < 0.9 * runs["float32"][0]
    assert runs["bfloat16"][-1] == pytest.approx(runs["float32"][-1], rel=0.03)


@pytest.mark.parametrize("optimizer", ["lomo", "adamw"])
def test_float16_scales_the_loss_and_skips_overflows(
    tiny_llama: Path, data_file: Path, tmp_path: Path, optimizer: str
) -> None:
    lr = {"lomo": 0.3, "adamw": 2e-3}[optimizer]
    out = run(
        tiny_llama,
        data_file,
        tmp_path / "out",
        model={"dtype": "float16"},
        optimizer={"name": optimizer, "lr": lr},
        train={"epochs": 2},
    )
    lines = metrics(out)
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert lines[0]["loss_scale"] == 2.0**16
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_packed_rows_train_like_records_apart(tiny_llama: Path, data_file: Path, tmp_path: Path) -> None:
    apart = run(
        tiny_llama, data_file, tmp_path / "a", data={"max_length": 256}, train={"micro_batch_size": 40}
    )
    packed = run(
        tiny_llama,
        data_file,
        tmp_path / "b",
        data={"max_length": 256, "packing": True},
        train={"micro_batch_size": 40},
    )
    assert metrics(packed)[0]["tokens"] == metrics(apart)[0]["tokens"]
    assert losses(packed) == pytest.approx(losses(apart), rel=2e-6)
    assert largest_difference(weights(apart), weights(packed)) < 1e-6


def test_custom_loss_is_called_with_the_arguments_it_names(
    tiny_llama: Path, data_file: Path, tmp_path: Path
) -> None:
    def summed(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum"
        )

    def per_token(labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(
            logits.transpose(1, 2).float(), labels.clamp(min=0), reduction="none"
        )

    plain = run(tiny_llama, data_file, tmp_path / "plain", train={"max_steps": 3})
    for name, loss_fn in (("summed", summed), ("per_token", per_token)):
        Trainer(
            config(tiny_llama, data_file, tmp_path / name, train={"max_steps": 3}), loss_fn=loss_fn
        ).train()
        assert losses(tmp_path / name) == pytest.approx(losses(plain), rel=2e-6)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda logits: None, "loss_fn returned None; expected a tensor"),
        (lambda logits: 1.5, r"loss_fn returned 1\.5; expected a tensor"),
        (lambda logits: logits.detach().sum(), "it does not depend on the model"),
    ],
)
def test_a_custom_loss_that_trains_nothing_is_refused(
    returned: Any, message: str, tiny_llama: Path, data_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        Trainer(config(tiny_llama, data_file, tmp_path / "run"), loss_fn=returned).train()


def test_trainable_and_frozen_patterns(tiny_llama: Path, data_file: Path, tmp_path: Path) -> None:
    from collie_core import AutoModelForCausalLM

    names = [name for name, _ in AutoModelForCausalLM.from_pretrained(tiny_llama).named_parameters()]
    block = next(name for name in names if ".1." in name).split(".1.")[0]
    out = run(
        tiny_llama,
        data_file,
        tmp_path / "out",
        train={"max_steps": 2, "trainable": [f"{block}.*"], "frozen": [f"{block}.0.*"]},
    )
    from safetensors.torch import load_file

    before, after = load_file(tiny_llama / "model.safetensors"), weights(out)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("layers.1." in name for name in changed)


def test_parameter_groups_have_their_own_rates(tiny_llama: Path, data_file: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    section = {"name": "lomo", "lr": 0.1, "weight_decay": 0.5, "param_groups": [{"params": "*", "lr": 1e-12}]}
    out = run(tiny_llama, data_file, tmp_path / "out", optimizer=section, train={"max_steps": 1})
    before, after = load_file(tiny_llama / "model.safetensors"), weights(out)
    assert largest_difference(before, after) < 1e-9
    decayed = run(
        tiny_llama,
        data_file,
        tmp_path / "b",
        optimizer={"name": "lomo", "lr": 1e-3, "weight_decay": 100.0},
        train={"max_steps": 1},
    )
    after = weights(decayed)
    ratio = {name: float(after[name].norm() / before[name].norm()) for name in before}
    assert all(
        value == pytest.approx(1.0, abs=0.02)
        for name, value in ratio.items()
        if "norm" in name or "embed" in name
    )
    assert all(value == pytest.approx(0.9, abs=0.02) for name, value in ratio.items() if "proj" in name)


def test_the_learning_rate_follows_the_schedule(tiny_llama: Path, data_file: Path, tmp_path: Path) -> None:
    out = run(
        tiny_llama,
        data_file,
        tmp_path / "out",
        schedule={"name": "linear", "warmup_steps": 2},
        optimizer={"name": "lomo", "lr": 0.5},
    )
    rates = [line["lr"] for line in metrics(out)]
    assert rates[0] < rates[1] == max(rates) and rates[-1] < rates[-2] < rates[2]


def test_results_are_the_same_twice(tiny_llama: Path, data_file: Path, tmp_path: Path) -> None:
    one = run(
        tiny_llama,
        data_file,
        tmp_path / "a",
        optimizer={"name": "adalomo"},
        model={"dtype": "bfloat16"},
        train={"deterministic": True},
    )
    other = run(
        tiny_llama,
        data_file,
        tmp_path / "b",
        optimizer={"name": "adalomo"},
        model={"dtype": "bfloat16"},
        train={"deterministic": True},
    )
    assert losses(one) == losses(other)
    assert largest_difference(weights(one), weights(other)) == 0.0


def test_a_compiled_run_leaves_room_for_the_graphs_of_the_next(
    tiny_llama: Path, data_file: Path, tmp_path: Path
) -> None:
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    from collie_models.decoder.blocks import SequentialBlock

    run(tiny_llama, data_file, tmp_path / "out", train={"compile": True, "max_steps": 1})
    assert not _debug_get_cache_entry_list(SequentialBlock.forward.__code__)


def test_evaluations_without_data_are_told(
    tiny_llama: Path, data_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(tiny_llama, data_file, tmp_path / "out", evaluate={"every_steps": 5})
    assert "warning: evaluate.every_steps evaluates nothing: there is no data.eval" in capfd.readouterr().err


def test_metrics_have_the_documented_keys(tiny_llama: Path, data_file: Path, tmp_path: Path) -> None:
    out = run(
        tiny_llama, data_file, tmp_path / "out", data={"eval": str(data_file)}, evaluate={"every_steps": 5}
    )
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    keys = [
        "step",
        "epoch",
        "loss",
        "lr",
        "grad_norm",
        "tokens",
        "tokens_per_second",
        "peak_memory_gib",
        "step_time",
    ]
    assert all(list(line) == keys for line in steps)
    assert [line["step"] for line in steps] == list(range(1, 11))
    evaluations = [line for line in lines if "perplexity/perplexity" in line]
    assert [line["step"] for line in evaluations] == [5, 10]
    assert not any("loss" in line for line in evaluations)
