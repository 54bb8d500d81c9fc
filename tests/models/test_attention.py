"""Attention: every implementation against the reference, and packing, padding and caches in each."""

from __future__ import annotations

from importlib import metadata
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from collie_core.errors import ConfigError
from collie_core.models.causal_lm import CausalLM, run_blocks
from collie_core.ops import Context, KVCache, select_ops
from collie_core.ops.attention import Scores
from collie_core.ops.context import Records
from collie_core.ops.implementations import ATTENTION
from collie_models.decoder.config import DecoderConfig
from collie_models.decoder.model import Decoder
from collie_models.decoder.rope_scaling import Dynamic, LongRope
from collie_models.decoder.rotary import Rotary

CPU = torch.device("cpu")
NAMES = sorted(name for name, how in ATTENTION.items() if not how.problem(CPU, torch.float32, False))


def make(name: str, heads: int = 4, kv_heads: int = 2, rotary: Rotary | None = None) -> CausalLM:
    """A small decoder with the same weights whatever the implementation."""
    config = DecoderConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=8,
        rotary=rotary or Rotary(8),
    )
    torch.manual_seed(0)
    return Decoder(config, select_ops(attention=name))


def ids(rows: int, length: int) -> Tensor:
    return torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(rows * 100 + length))


def gradients(model: CausalLM) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "rotary",
    [
        Rotary(8),
        Rotary(8, scaling=Dynamic(2.0, 6)),
        Rotary(8, scaling=LongRope((1.0,) * 4, (1.0, 2.0, 3.0, 4.0), 6, 1.2)),
    ],
    ids=["default", "dynamic", "longrope"],
)
def test_packed_records_equal_records_alone(name: str, rotary: Rotary) -> None:
    model = make(name, rotary=rotary)
    lengths, width = (5, 9, 3), 20
    records = [ids(1, n) for n in lengths]
    packed, segments, positions = (torch.zeros(1, width, dtype=torch.int64) for _ in range(3))
    start = 0
    for number, record in enumerate(records, 1):
        end = start + record.shape[1]
        packed[:, start:end], segments[:, start:end] = record, number
        positions[:, start:end] = torch.arange(record.shape[1])
        start = end
    alone = torch.cat([model(record).logits for record in records], 1)
    alone.square().sum().backward()
    expected = gradients(model)

    ctx = Context.build(packed, position_ids=positions, segments=segments)
    together = model.head(run_blocks(model, packed, ctx), ctx)[:, :start]
    together.square().sum().backward()

    torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-5)
    for key, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[key], atol=2e-3, rtol=1e-4)
    # without segments the records would see each other
    leaked = model(packed, position_ids=positions).logits[:, :start]
    assert float((leaked - alone).detach().abs().max()) > 1e-2


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_nothing_and_gives_no_nan(name: str, side: str) -> None:
    model = make(name)
    row = ids(1, 6)
    pads = torch.full((1, 4), 7)
    padded = torch.cat([pads, row] if side == "left" else [row, pads], 1)
    real = slice(4, None) if side == "left" else slice(0, 6)
    mask = torch.zeros(1, 10, dtype=torch.int64)
    mask[:, real] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded, mask, positions = (torch.cat([t, t]) for t in (padded, mask, positions))
    mask[1], positions[1] = 1, torch.arange(10)  # a row without padding beside it

    found = model(padded, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(found[:1, real], model(row).logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1:], model(padded[1:]).logits, atol=1e-5, rtol=1e-5)
    assert bool(found.isfinite().all())
    found[:, real].sum().backward()
    assert all(bool(gradient.isfinite().all()) for gradient in gradients(model).values())


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_implementations_agree(kv_heads: int) -> None:
    batch = ids(2, 11)
    outputs = []
    for name in NAMES:
        model = make(name, kv_heads=kv_heads)
        logits = model(batch).logits
        logits.square().sum().backward()
        outputs.append((logits, gradients(model)))
    for logits, found in outputs[1:]:
        torch.testing.assert_close(logits, outputs[0][0], atol=1e-5, rtol=1e-5)
        for key in found:
            torch.testing.assert_close(found[key], outputs[0][1][key], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pieces", [(4, 1, 1, 1), (3, 4), (1, 6)])
def test_cache_gives_what_a_whole_pass_gives(name: str, pieces: tuple[int, ...]) -> None:
    model = make(name)
    batch = ids(2, 7)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, :2] = False
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    whole = model(batch, attention_mask=mask, position_ids=positions).logits
    cache, found, start = KVCache(list(model.blocks), capacity=2), [], 0
    with torch.no_grad():
        for size in pieces:
            end = start + size
            ctx = Context(batch[:, start:end], positions[:, start:end], attention_mask=mask[:, :end])
            found.append(model.head(run_blocks(model, batch[:, start:end], ctx, cache), ctx))
            start = end
    assert cache.length == 7
    torch.testing.assert_close(torch.cat(found, 1)[0, 2:], whole[0, 2:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat(found, 1)[1], whole[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_prefix_is_seen_from_everywhere(name: str) -> None:
    attend = select_ops(attention=name).attention
    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    ctx = Context.build(ids(1, 5))
    ctx.prefix = torch.tensor([[True, True, True, False, False]])
    found = attend(q, k, v, ctx)
    first = (q[:, :, :1] @ k[:, :, :3].transpose(-1, -2) / 8**0.5).softmax(-1) @ v[:, :, :3]
    torch.testing.assert_close(found[:, :, :1], first)
    last = (q[:, :, 4:] @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v
    torch.testing.assert_close(found[:, :, 4:], last)


def test_scale_and_dtype() -> None:
    q, k, v = (torch.randn(1, 2, 5, 8, dtype=torch.bfloat16) for _ in range(3))
    for name in NAMES:
        attend = select_ops(attention=name).attention
        out = attend(q, k, v, Context.build(ids(1, 5)), scale=1e-6)
        assert out.dtype == torch.bfloat16
        mean = torch.stack([v[:, :, : n + 1].float().mean(2) for n in range(5)], 2)  # scores of nearly zero
        torch.testing.assert_close(out.float(), mean, atol=2e-2, rtol=2e-2)


def test_positions_restart_at_each_record() -> None:
    segments = torch.tensor([[1, 1, 1, 2, 2, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
    found = Context.build(ids(2, 8), segments=segments).positions
    assert found.tolist() == [[0, 1, 2, 0, 1, 0, 0, 1], list(range(8))]
    given = torch.zeros(2, 8, dtype=torch.int64)
    assert Context.build(ids(2, 8), position_ids=given, segments=segments).positions is given


def test_a_mask_of_ones_is_no_mask() -> None:
    assert Context.build(ids(2, 4), attention_mask=torch.ones(2, 4)).attention_mask is None


def segments() -> Tensor:
    """Records in two rows; the first row ends in padding."""
    return torch.tensor([[1, 1, 1, 2, 2, 3, 0, 0], [1, 1, 1, 1, 1, 1, 2, 2]])


def test_records_are_where_segments_change() -> None:
    records = Records.of(segments())
    assert records.starts.tolist() == [0, 3, 5, 6, 8, 14] + [16] * 11  # padding and each row begin one
    assert records.starts.dtype == torch.int32 and records.longest == 128
    many = Records.of(torch.arange(400).repeat(2, 1))
    assert len(many.starts) == 1025 and many.starts[800:].eq(800).all()
    assert Records.of(torch.ones(1, 300, dtype=torch.int64)).longest == 512


@pytest.mark.parametrize("scores", [Scores(), Scores(window=3), Scores(softcap=2.0)], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_flex_sees_what_the_reference_sees(scores: Scores, packed: bool) -> None:
    from collie_core.ops.attention_flex import flex

    q, k, v = (torch.randn(2, heads, 8, 16) for heads in (4, 2, 2))
    ctx = Context.build(ids(2, 8), segments=segments() if packed else None)
    expected = select_ops("reference").attention(q, k, v, ctx, None, scores)
    torch.testing.assert_close(flex(q, k, v, ctx, None, scores), expected)


class FlashAttn:
    """Stands for the package: the same functions and arguments, computed by the reference."""

    def flash_attn_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        softmax_scale: float,
        causal: bool,
        window_size: tuple[int, int],
        softcap: float,
        deterministic: bool,
    ) -> Tensor:
        assert causal and window_size[1] == 0 and not deterministic
        scores = Scores(None if window_size[0] == -1 else window_size[0] + 1, softcap or None)
        attend = select_ops("reference").attention
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return attend(q, k, v, Context.build(ids(len(q), q.shape[2])), softmax_scale, scores).transpose(1, 2)

    def flash_attn_varlen_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        **how: Any,
    ) -> tuple[Tensor, None]:
        bounds = cu_seqlens_q.tolist()
        assert bounds == cu_seqlens_k.tolist() and max_seqlen_q == max_seqlen_k
        assert max_seqlen_q >= int(cu_seqlens_q.diff().max())
        parts = [
            self.flash_attn_func(q[None, begin:end], k[None, begin:end], v[None, begin:end], **how)[0]
            for begin, end in pairwise(bounds)
            if begin < end
        ]
        return torch.cat(parts), None


@pytest.mark.parametrize("scores", [Scores(), Scores(window=3), Scores(softcap=2.0)], ids=str)
def test_the_package_flash_attn_is_asked_for_the_same(scores: Scores) -> None:
    from collie_core.ops.attention_packages import of_module

    kernel = of_module(FlashAttn())
    q, k, v = (torch.randn(2, heads, 8, 16) for heads in (4, 2, 2))
    for packed in (None, segments()):
        ctx = Context.build(ids(2, 8), segments=packed)
        expected = select_ops("reference").attention(q, k, v, ctx, 0.3, scores)
        records = None if packed is None else Records.of(packed)
        found = kernel(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            records,
            0.3,
            scores.window,
            scores.softcap,
        )
        torch.testing.assert_close(found.transpose(1, 2), expected)


def test_choice_of_implementations() -> None:
    names = {"attention": "sdpa", "packed_attention": "mask", "cross_entropy": "chunked"}
    assert select_ops().describe() == names
    assert select_ops(use_flash=False).describe()["attention"] == "sdpa"
    assert select_ops(attention="reference", cross_entropy="plain").describe() == {
        "attention": "reference",
        "packed_attention": "mask",
        "cross_entropy": "plain",
    }


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"attention": "sdap"}, "ops.attention: unknown implementation 'sdap', did you mean 'sdpa'"),
        ({"cross_entropy": "x"}, "ops.cross_entropy: unknown implementation 'x'"),
        ({"attention": "cudnn"}, "ops.attention: cudnn needs a CUDA device, and this run is on cpu"),
        ({"attention": "flash_attn_4"}, "flash_attn_4 needs the package flash-attn-4, which is not"),
        ({"attention": "flash_attn"}, "needs the package flash-attn or flash-attn-3, which is not installed"),
        ({"cross_entropy": "liger"}, "liger needs the package liger-kernel, which is not installed"),
        ({"use_flash": True}, "use_flash: true, but FlashAttention needs a CUDA device"),
        ({"use_flash": False, "attention": "cudnn"}, "use_flash: false, but ops.attention: cudnn uses"),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_refused(
    asked: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata.Distribution, "discover", lambda **_: iter(()))  # nothing is installed
    with pytest.raises(ConfigError, match=message):
        select_ops(**asked)
