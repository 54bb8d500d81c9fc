"""Attention on a CUDA device: every implementation that is there against the reference, in bf16."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from collie_core.ops import Context, select_ops
from collie_core.ops.attention import PLAIN, Attention, Scores
from collie_core.ops.context import Records
from collie_core.ops.implementations import ATTENTION

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CUDA = torch.device("cuda")
NAMES = [name for name in ATTENTION if name != "reference"]
#: (query heads, key-value heads, channels)
HEADS = [(4, 4, 128), (8, 2, 64), (4, 1, 128)]


def attention(name: str) -> Attention:
    problem = ATTENTION[name].problem(CUDA, torch.bfloat16, False)
    if problem:
        pytest.skip(f"{name} {problem}")
    return select_ops(name, device=CUDA, dtype=torch.bfloat16).attention


def inputs(rows: int, length: int, heads: int, kv_heads: int, width: int) -> tuple[list[Tensor], Tensor]:
    """q, k, v as a block makes them, (B, S, H, D) seen as (B, H, S, D), and a gradient of the output."""
    generator = torch.Generator(CUDA).manual_seed(0)
    made = [
        torch.randn(rows, length, h, width, generator=generator, device=CUDA).bfloat16().transpose(1, 2)
        for h in (heads, kv_heads, kv_heads, heads)
    ]
    return made[:3], made[3]


def outcome(
    attend: Attention, qkv: list[Tensor], gradient: Tensor, ctx: Context, scores: Scores = PLAIN
) -> list[Tensor]:
    """Output and gradients of q, k and v."""
    q, k, v = (tensor.detach().requires_grad_() for tensor in qkv)
    out = attend(q, k, v, ctx, None, scores)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), gradient)]


def assert_near(found: list[Tensor], expected: list[Tensor], error: float = 0.015) -> None:
    """Each tensor within a relative error, as a norm, of what it should be."""
    for name, one, other in zip(("output", "dq", "dk", "dv"), found, expected, strict=True):
        assert bool(one.isfinite().all()), name
        size = other.float().norm() + 0.01 * other.numel() ** 0.5  # of q it is 0 in a record of one token
        apart = (one.float() - other.float()).norm() / size
        assert float(apart) < error, f"{name}: {float(apart):.4f}"


def plain(rows: int, length: int) -> Context:
    return Context.build(torch.zeros(rows, length, dtype=torch.int64, device=CUDA))


#: Lengths of the records of each row of 256 positions; the rest is padding.
RECORDS = [[100, 1, 130], [256], [17, 60, 60, 64], [255, 1]]


def packed() -> Context:
    segments = torch.zeros(len(RECORDS), 256, dtype=torch.int64)
    for row, lengths in enumerate(RECORDS):
        segments[row, : sum(lengths)] = torch.repeat_interleave(
            torch.arange(1, len(lengths) + 1), torch.tensor(lengths)
        )
    records = Records.of(segments)
    return Context.build(
        torch.zeros(segments.shape, dtype=torch.int64, device=CUDA),
        segments=segments.to(CUDA),
        records=Records(records.starts.to(CUDA), records.longest),
    )


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_whole_rows(name: str, heads: tuple[int, int, int]) -> None:
    attend, expected = attention(name), attention("reference")
    for rows, length in ((2, 384), (1, 200)):
        qkv, gradient = inputs(rows, length, *heads)
        ctx = plain(rows, length)
        assert_near(outcome(attend, qkv, gradient, ctx), outcome(expected, qkv, gradient, ctx))


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_packed_records_equal_records_alone(name: str, heads: tuple[int, int, int]) -> None:
    attend, expected = attention(name), attention("reference")
    qkv, gradient = inputs(len(RECORDS), 256, *heads)
    found = outcome(attend, qkv, gradient, packed())
    for row, lengths in enumerate(RECORDS):
        begin = 0
        for length in lengths:
            here = (slice(row, row + 1), slice(None), slice(begin, begin + length))
            alone = outcome(expected, [x[here] for x in qkv], gradient[here], plain(1, length))
            assert_near([x[here] for x in found], alone, 0.03)  # a record of one token has few numbers
            begin += length
    assert all(bool(tensor.isfinite().all()) for tensor in found)  # padding too


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scores", [Scores(window=48), Scores(softcap=5.0), Scores(window=48, softcap=5.0)])
def test_windows_and_soft_caps(name: str, scores: Scores) -> None:
    attend, expected = attention(name), attention("reference")
    qkv, gradient = inputs(len(RECORDS), 256, 4, 2, 64)
    for ctx in (packed(), plain(len(RECORDS), 256)):
        found = outcome(attend, qkv, gradient, ctx, scores)
        assert_near(found, outcome(expected, qkv, gradient, ctx, scores))


@pytest.mark.parametrize("name", NAMES)
def test_compiled_it_is_one_graph_for_all_lengths(name: str) -> None:
    """Different numbers of records and rows are compiled once for the first and once for all others."""
    attend, expected = attention(name), attention("reference")
    if name.startswith("flash_attn") and name != "flash_attn_4":
        pytest.skip("the package decides what it hides from torch.compile")
    torch._dynamo.reset()
    graphs: list[int] = []

    def count(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(1)
        return graph

    traced = torch.compile(attend, backend=count, fullgraph=True)
    compiled = torch.compile(attend, fullgraph=True)
    for length in (128, 192, 256, 320):
        qkv, gradient = inputs(2, length, 4, 2, 64)
        segments = torch.ones(2, length, dtype=torch.int64)
        segments[:, length // 3 :] = 2
        records = Records.of(segments)
        ctx = Context.build(
            torch.zeros(2, length, dtype=torch.int64, device=CUDA),
            segments=segments.to(CUDA),
            records=Records(records.starts.to(CUDA), records.longest),
        )
        ATTENTION[name].prepare(ctx)
        outcome(traced, qkv, gradient, ctx)
        assert_near(outcome(compiled, qkv, gradient, ctx), outcome(expected, qkv, gradient, ctx))
    assert len(graphs) <= 3, len(graphs)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_deterministic_runs_take_what_is_repeatable(deterministic: None) -> None:
    ops = select_ops(device=CUDA, dtype=torch.bfloat16, deterministic=True)
    assert ops.describe()["attention"] == "flash"
    for ctx in (packed(), plain(len(RECORDS), 256)):
        qkv, gradient = inputs(len(RECORDS), 256, 4, 2, 64)
        first, second = (outcome(ops.attention, qkv, gradient, ctx) for _ in range(2))
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["cudnn", "flash", "varlen", "flex", "flash_attn_4"])
def test_nothing_waits_for_the_device(name: str) -> None:
    attend = attention(name)
    for ctx in (packed(), plain(len(RECORDS), 256)):
        qkv, gradient = inputs(len(RECORDS), 256, 4, 4, 64)
        outcome(attend, qkv, gradient, ctx)
        ctx = packed() if ctx.segments is not None else ctx  # nothing is prepared
        torch.cuda.set_sync_debug_mode("error")
        try:
            outcome(attend, qkv, gradient, ctx)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_what_auto_takes() -> None:
    major = torch.cuda.get_device_capability()[0]
    half = "cudnn" if major >= 9 else "flash" if major >= 8 else "sdpa"
    names = select_ops(device=CUDA, dtype=torch.bfloat16).describe()
    assert names["attention"] == half
    assert select_ops(device=CUDA, dtype=torch.float32).describe()["attention"] == "sdpa"
    assert select_ops(device=CUDA, use_flash=False).describe()["attention"] == "sdpa_without_flash"
    if major >= 8:
        assert names["packed_attention"] == "varlen"
        assert select_ops(device=CUDA, use_flash=True).describe() == names
