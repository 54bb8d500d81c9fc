"""ChatGLM-6B, and the options of ChatGLM2 that no released model uses, against formulas written out here.

Batches, padding, packing and caches must agree with what the formulas make of one record alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from chatglm_formulas import EOP, GMASK, MASK, PAD, SOP, checkpoint_1, checkpoint_2, first, second
from family_checkpoints import write_checkpoint
from safetensors.torch import load_file
from torch import Tensor

from collie_core import AutoModelForCausalLM
from collie_core.cli.main import main
from collie_core.errors import ConfigError, UserError
from collie_core.models.causal_lm import CausalLM, run_blocks
from collie_core.models.forward import model_context
from collie_core.ops import Context, select_ops
from collie_models.chatglm import ChatGLM2ForCausalLM, ChatGLMForCausalLM

OPTIONS_2: dict[str, dict[str, Any]] = {
    "layer_norm": {"rmsnorm": False},
    "biases": {"add_bias_linear": True, "add_qkv_bias": False},
    "by_head": {"multi_query_attention": False, "multi_query_group_num": 1},
    "residual_after_norm": {"apply_residual_connection_post_layernorm": True},
    "no_last_norm": {"post_layer_norm": False},
    "all": {
        "rmsnorm": False,
        "add_bias_linear": True,
        "multi_query_attention": False,
        "apply_residual_connection_post_layernorm": True,
        "post_layer_norm": False,
        "kv_channels": 12,
        "rope_ratio": 3,
    },
    "32k": {"rope_ratio": 4, "_name_or_path": "THUDM/chatglm2-6b-32k"},
}


RECORDS = (
    [10, 11, 12, 13, GMASK, SOP, 20, 21, 22],
    [30, MASK, 31, 32, SOP, 40, 41],
    [50, MASK, 51, GMASK, 52, SOP, 60, 61, 62, 63, EOP],  # both: [gMASK] counts
    [GMASK, SOP, 70, 71, 72],
)


def padded(records: Sequence[Sequence[int]], left: bool) -> tuple[Tensor, Tensor]:
    longest = max(map(len, records))
    ids, mask = torch.full((len(records), longest), PAD), torch.zeros(len(records), longest, dtype=torch.long)
    for row, record in enumerate(records):
        begin = longest - len(record) if left else 0
        ids[row, begin : begin + len(record)] = torch.tensor(record)
        mask[row, begin : begin + len(record)] = 1
    return ids, mask


@pytest.fixture
def model_1(tmp_path: Path) -> tuple[CausalLM, Callable[[Sequence[int]], Tensor]]:
    """A ChatGLM-6B and its formula."""
    config, tensors = checkpoint_1(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    return model, lambda ids: first(tensors, config, list(ids)).float()


Model1 = tuple[CausalLM, Callable[[Sequence[int]], Tensor]]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_layers": 28},
        {"num_attention_heads": 2, "inner_hidden_size": 100, "vocab_size": 130},
        {"tie_word_embeddings": False},
        {"tie_word_embeddings": True, "num_layers": 1, "layernorm_epsilon": 1e-3},
    ],
)
def test_chatglm_is_its_formula(changes: dict[str, Any], tmp_path: Path) -> None:
    config, tensors = checkpoint_1(tmp_path, **changes)
    model = ChatGLMForCausalLM.from_pretrained(tmp_path)
    for record in RECORDS:
        found = model(torch.tensor([record])).logits[0]
        torch.testing.assert_close(found, first(tensors, config, record).float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("left", [True, False])
def test_padding_changes_nothing(model_1: Model1, left: bool) -> None:
    model, formula = model_1
    ids, mask = padded(RECORDS, left)
    logits = model(ids, mask).logits
    for row, record in enumerate(RECORDS):
        torch.testing.assert_close(logits[row][mask[row].bool()], formula(record), atol=1e-4, rtol=1e-4)


def test_records_of_a_packed_row_are_apart(model_1: Model1) -> None:
    model, formula = model_1
    ids = torch.tensor([[token for record in RECORDS for token in record] + [PAD] * 4])
    segments = torch.tensor([[n + 1 for n, record in enumerate(RECORDS) for _ in record] + [0] * 4])
    ctx = model_context(model, Context.build(ids, segments=segments))
    logits = model.head(run_blocks(model, ids, ctx), ctx)[0]
    begin = 0
    for record in RECORDS:
        found = logits[begin : begin + len(record)]
        torch.testing.assert_close(found, formula(record), atol=1e-4, rtol=1e-4)
        begin += len(record)


def test_packed_gradients_are_those_of_records_alone(model_1: Model1) -> None:
    model, _ = model_1
    ops = select_ops()
    labels = [[-100] * (r.index(SOP) + 1) + r[r.index(SOP) + 1 :] for r in RECORDS]

    def backward(ids: Tensor, targets: Tensor, segments: Tensor | None) -> float:
        ctx = model_context(model, Context.build(ids, segments=segments))
        loss = ops.linear_cross_entropy(model.head, run_blocks(model, ids, ctx), targets, ctx)
        loss.backward()
        return float(loss.detach())

    alone = sum(
        backward(torch.tensor([r]), torch.tensor([target]), None)
        for r, target in zip(RECORDS, labels, strict=True)
    )
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    packed = backward(
        torch.tensor([sum(RECORDS, [])]),
        torch.tensor([sum(labels, [])]),
        torch.tensor([[n + 1 for n, r in enumerate(RECORDS) for _ in r]]),
    )
    assert packed == pytest.approx(alone, rel=1e-5)
    assert set(expected) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-4, rtol=1e-3)


def test_greedy_generation_follows_the_formula(model_1: Model1) -> None:
    model, formula = model_1
    prompts = [record[: record.index(SOP) + 1] for record in RECORDS]
    ids, mask = padded(prompts, left=True)
    found = model.generate(ids, mask, max_new_tokens=8, eos_token_id=-1)
    for row, prompt in enumerate(prompts):
        grown = list(prompt)
        for _ in range(8):
            grown.append(int(formula(grown)[-1].argmax()))
        assert found[row, ids.shape[1] :].tolist() == grown[len(prompt) :]


def test_the_originals_masks_and_positions(model_1: Model1) -> None:
    """(B, 1, S, S), true where a token is hidden, and (B, 2, S); a mask that says else is refused."""
    model, _ = model_1
    ids, mask = padded(RECORDS, left=True)
    hidden = torch.ones(len(ids), 1, ids.shape[1], ids.shape[1], dtype=torch.bool)
    positions = torch.zeros(len(ids), 2, ids.shape[1], dtype=torch.long)
    for row, record in enumerate(RECORDS):
        begin, sop = ids.shape[1] - len(record), record.index(SOP)
        place = record.index(GMASK) if GMASK in record else record.index(MASK)
        for q in range(len(record)):
            positions[row, :, begin + q] = torch.tensor([q, 0] if q < sop else [place, q - sop + 1])
            for k in range(len(record)):
                hidden[row, 0, begin + q, begin + k] = not (k <= q or k < sop)
    expected = model(ids, mask).logits[mask.bool()]
    assert torch.equal(model(ids, hidden).logits[mask.bool()], expected)
    torch.testing.assert_close(model(ids, mask, positions).logits[mask.bool()], expected)
    options: dict[str, Any] = {"max_new_tokens": 3, "eos_token_id": -1}
    assert torch.equal(model.generate(ids, hidden, **options), model.generate(ids, mask, **options))
    moved = model(ids, mask, positions * 3).logits[mask.bool()]
    assert not torch.allclose(moved, expected, atol=1e-3)
    with pytest.raises(UserError, match=r"position_ids: expected \(batch, 2, length\)"):
        model(ids, mask, positions[:, 0])
    hidden[0, 0, -1, -3] = True
    with pytest.raises(UserError, match="hides other tokens"):
        model(ids, hidden)
    with pytest.raises(UserError, match="expected \\(batch, length\\), or bool"):
        model(ids, hidden.int())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near(dtype: torch.dtype, tmp_path: Path) -> None:
    checkpoint_1(tmp_path, num_layers=4)
    ids, mask = padded(RECORDS, left=True)
    whole, half = (AutoModelForCausalLM.from_pretrained(tmp_path, dtype=d) for d in (torch.float32, dtype))
    with torch.no_grad():
        expected, found = (model(ids, mask).logits[mask.bool()] for model in (whole, half))
    assert found.dtype == dtype
    assert (found.float() - expected).norm() / expected.norm() < (0.01 if dtype == torch.float16 else 0.06)


@pytest.mark.parametrize("tie", [None, True, False])
def test_chatglm_saves_what_it_loaded(tie: bool | None, tmp_path: Path) -> None:
    _, tensors = checkpoint_1(tmp_path / "source", **({} if tie is None else {"tie_word_embeddings": tie}))
    buffers = {f"transformer.layers.{i}.attention.rotary_emb.inv_freq": torch.ones(2) for i in range(2)}
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    halves = {name: tensor.half() for name, tensor in tensors.items()}
    write_checkpoint(tmp_path / "source", config | {"torch_dtype": "float16"}, halves | buffers)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float16)
    model.save_pretrained(tmp_path / "saved")
    assert main(["export", str(tmp_path / "source"), str(tmp_path / "exported")]) == 0
    for folder in ("saved", "exported"):
        saved = load_file(tmp_path / folder / "model.safetensors")
        assert saved.keys() == halves.keys()
        assert all(torch.equal(saved[name], halves[name]) for name in halves)
        assert json.loads((tmp_path / folder / "config.json").read_text()) == config | {
            "torch_dtype": "float16"
        }
    names = dict(model.named_parameters(remove_duplicate=False))
    assert (names["head.lm_head.weight"] is names["embed.tokens.weight"]) == (tie is not False)


def test_a_checkpoint_without_the_tied_head_loads(tmp_path: Path) -> None:
    config, tensors = checkpoint_1(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path)(torch.tensor([RECORDS[0]])).logits
    del tensors["lm_head.weight"]
    write_checkpoint(tmp_path, config, tensors)
    found = AutoModelForCausalLM.from_pretrained(tmp_path)(torch.tensor([RECORDS[0]])).logits
    assert torch.equal(found, expected)


@pytest.mark.parametrize("option", sorted(OPTIONS_2))
def test_chatglm2_is_its_formula(option: str, tmp_path: Path) -> None:
    config, tensors = checkpoint_2(tmp_path, **OPTIONS_2[option])
    model = ChatGLM2ForCausalLM.from_pretrained(tmp_path)
    ids = [91, 93, 5, 8, 13, 21, 34, 55, 6, 7]
    expected = second(tensors, config, ids).float()
    torch.testing.assert_close(model(torch.tensor([ids])).logits[0], expected, atol=1e-4, rtol=1e-4)
    row = torch.tensor([[0, 0, 0, *ids]])
    mask = (torch.arange(row.shape[1]) >= 3).long().unsqueeze(0)
    found = model.generate(row, mask, max_new_tokens=6, eos_token_id=-1)
    for _ in range(6):
        ids.append(int(second(tensors, config, ids)[-1].argmax()))
    assert found[0, 3:].tolist() == ids
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rmsnorm": False}, "rmsnorm: false"),
        ({"add_bias_linear": True}, "add_bias_linear: true"),
        (
            {"apply_residual_connection_post_layernorm": True},
            "apply_residual_connection_post_layernorm: true",
        ),
        ({"post_layer_norm": False}, "post_layer_norm: false"),
    ],
)
def test_what_glm_cannot_hold_is_not_exported(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    checkpoint_2(tmp_path / "source", **changes)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    assert model.origin is not None
    with pytest.raises(ConfigError, match=message):
        model.origin.provider.export_as["glm"].config(model.origin.hf_config)
    assert main(["export", str(tmp_path / "source"), str(tmp_path / "out"), "--as", "glm"]) == 2
    assert not (tmp_path / "out").exists()
