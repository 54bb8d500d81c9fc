"""SophiaG's pass of its own: labels drawn from the model, and the estimate that comes of them."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from training_helpers import config, largest_difference, losses, weights

from collie_core import Trainer
from collie_core.train.setup import open_training
from collie_methods.optimizers.sophia import drawn_labels

BETA2 = 0.99


def test_labels_are_drawn_as_the_model_says() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5).expand(20000, 5)
    labels = torch.zeros(20000, dtype=torch.int64)
    labels[::4] = -100
    found = drawn_labels(logits, labels, (0, 1))
    assert torch.equal(found == -100, labels == -100)
    shares = torch.bincount(found[found >= 0], minlength=5) / (found >= 0).sum()
    torch.testing.assert_close(shares, logits[0].softmax(-1), rtol=0, atol=0.02)


def test_labels_depend_on_seed_step_and_targets_alone() -> None:
    logits, labels = torch.randn(50, 300), torch.zeros(50, dtype=torch.int64)
    first = drawn_labels(logits, labels, (0, 1))
    torch.manual_seed(7)  # another rank's generator
    assert torch.equal(first, drawn_labels(logits, labels, (0, 1)))
    padded = drawn_labels(F.pad(logits, (0, 0, 2, 5)), F.pad(labels, (2, 5), value=-100), (0, 1))
    assert torch.equal(padded, F.pad(first, (2, 5), value=-100))
    for changed, draws in ((labels + 1, (0, 1)), (labels, (1, 1)), (labels, (0, 2))):
        assert not torch.equal(first, drawn_labels(logits, changed, draws))


def test_where_the_data_lies_changes_nothing(tiny_llama: Path, data_file: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "records.jsonl"
    moved.parent.mkdir()
    moved.write_bytes(data_file.read_bytes())
    for data, out in ((data_file, tmp_path / "one"), (moved, tmp_path / "other")):
        section = {"name": "sophiag", "lr": 1e-4}
        Trainer(config(tiny_llama, data, out, optimizer=section, train={"max_steps": 3})).train()
    assert losses(tmp_path / "one") == losses(tmp_path / "other")
    assert largest_difference(weights(tmp_path / "one"), weights(tmp_path / "other")) == 0.0


@pytest.mark.parametrize("rows", [4, 2])
def test_the_estimate_is_that_of_the_paper(
    tiny_llama: Path, data_file: Path, tmp_path: Path, rows: int
) -> None:
    """h = (1 - beta2) B g² (arXiv 2305.14342, algorithm 2), g that of the mean loss over B drawn labels."""
    from transformers import LlamaForCausalLM

    section = {"name": "sophiag", "lr": 1e-4, "betas": [0.96, BETA2], "clip_grad_norm": 1e-3}
    train = {"micro_batch_size": rows, "gradient_accumulation_steps": 4 // rows}
    cfg = config(tiny_llama, data_file, tmp_path / "out", optimizer=section, train=train, seed=5)
    with open_training(Trainer(cfg)) as session:
        batch = next(iter(session.reader))
        layout: Any = session.layout
        layout.train_step(batch, 1e-4)
        found = {k: v.clone() for k, v in layout.optimizer.state_dict().items() if k.endswith(".hessian")}
    model = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    total = torch.zeros(())
    for micro in batch.micro_batches:
        logits = model(micro.input_ids).logits[:, :-1]
        for row, labels in zip(logits, micro.labels[:, 1:], strict=True):
            drawn = drawn_labels(row.detach(), labels, (5, 1))
            total = total + F.cross_entropy(row, drawn, reduction="sum")
    (total / batch.target_tokens).backward()
    layers: Any = model.model.layers
    for name, theirs in (
        ("0.*q_proj.weight", layers[0].self_attn.q_proj.weight),
        ("1.*down_proj.weight", layers[1].mlp.down_proj.weight),
    ):
        [ours] = [value for key, value in found.items() if fnmatch(key, f"blocks.{name}.hessian")]
        expected = (1 - BETA2) * batch.target_tokens * theirs.grad.double() ** 2
        torch.testing.assert_close(ours.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.max()))
        assert expected.max() > 1e-9


def test_it_trains(tiny_llama: Path, data_file: Path, tmp_path: Path) -> None:
    section = {"name": "sophiag", "lr": 2e-3, "hessian_every": 2}
    cfg = config(tiny_llama, data_file, tmp_path / "out", optimizer=section, train={"epochs": 3})
    Trainer(cfg).train()
    found = losses(tmp_path / "out")
    assert found[-1] < 0.9 * found[0]
