"""Linear cross entropy: loss, gradients and hooks equal those of the plain computation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from collie_core.ops import Context, cross_entropy, select_ops

HIDDEN, VOCABULARY = 8, 40


class Head(nn.Module):
    """A norm and a projection with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(HIDDEN)
        self.proj = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, h: Tensor, ctx: Context) -> Tensor:
        out: Tensor = self.proj(self.norm(h))
        return out


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows a chunk, so that these small cases take several."""
    monkeypatch.setattr(cross_entropy, "_CHUNK_LOGITS", {"cpu": 3 * VOCABULARY, "cuda": 3 * VOCABULARY})


def batch(masked: float = 0.3, rows: int = 2, length: int = 9) -> tuple[Tensor, Tensor, Context]:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(rows, length, HIDDEN, generator=generator)
    labels = torch.randint(0, VOCABULARY, (rows, length), generator=generator)
    labels[torch.rand(rows, length, generator=generator) < masked] = -100
    return h, labels, Context.build(labels.clamp(min=0))


def run(
    name: str, head: nn.Module, h: Tensor, labels: Tensor, ctx: Context, scale: float = 1.0
) -> list[Tensor]:
    """Loss, gradient of h, gradients of the head's parameters."""
    head.zero_grad()
    h = h.detach().requires_grad_()
    loss = select_ops(cross_entropy=name).linear_cross_entropy(head, h, labels, ctx)
    assert loss.shape == () and loss.dtype == torch.float32
    (loss * scale).backward()
    assert h.grad is not None
    return [loss.detach(), h.grad, *(p.grad for p in head.parameters() if p.grad is not None)]


@pytest.mark.parametrize("masked", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("scale", [1.0, 0.125])
def test_equals_plain(masked: float, scale: float) -> None:
    head = Head()
    h, labels, ctx = batch(masked)
    expected, found = (run(name, head, h, labels, ctx, scale) for name in ("plain", "chunked"))
    assert len(found) == len(expected) == 5
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    if masked == 1.0:
        assert float(found[0]) == 0.0 and float(found[2].abs().max()) == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_over_chunks_in_fp32(dtype: torch.dtype) -> None:
    head = Head().to(dtype)
    h, labels, ctx = batch(0.0, rows=4, length=101)
    exact = run("plain", head_like(head).double(), h.to(dtype).double(), labels, ctx)
    found = run("chunked", head, h.to(dtype), labels, ctx)
    assert found[1].dtype == found[2].dtype == dtype
    assert abs(float(found[0]) / float(exact[0]) - 1) < 5e-3
    for a, b in zip(found[1:], exact[1:], strict=True):
        assert float((a.double() - b).norm() / b.norm()) < 1e-2


def head_like(head: nn.Module) -> nn.Module:
    copy = Head()
    copy.load_state_dict(head.state_dict())
    return copy


def test_a_summed_gradient_beyond_fp16_survives_its_scaling() -> None:
    head = Head().half()
    h, labels, ctx = batch(0.0, rows=1, length=200)
    labels[:] = 3
    h = h.abs().half() * 0 + 1
    with torch.no_grad():
        head.proj.weight.zero_()
        head.norm.weight.fill_(2000.0)
    found = run("chunked", head, h, labels, ctx, scale=1 / 1024)
    expected = 2000.0 * 199 * (1 - 1 / VOCABULARY) / 1024  # 388,000 before the scaling; fp16 ends at 65,504
    torch.testing.assert_close(-found[3][3], torch.full((HIDDEN,), expected).half(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("name", ["plain", "chunked"])
def test_every_hook_fires_once(name: str) -> None:
    embedding, head = nn.Embedding(VOCABULARY, HIDDEN), Head()
    head.proj.weight = embedding.weight  # tied: its gradient comes from both ends
    middle = nn.Linear(HIDDEN, HIDDEN)
    fired: Counter[str] = Counter()
    modules = nn.ModuleDict({"embedding": embedding, "middle": middle, "head": head})

    def note(parameter_name: str) -> Callable[[Tensor], None]:
        return lambda _: fired.update([parameter_name])

    for parameter_name, parameter in modules.named_parameters():
        parameter.register_post_accumulate_grad_hook(note(parameter_name))
    _, labels, ctx = batch()
    h = checkpoint(middle, embedding(labels.clamp(min=0)), use_reentrant=False)
    select_ops(cross_entropy=name).linear_cross_entropy(head, h, labels, ctx).backward()
    assert fired == {n: 1 for n, _ in modules.named_parameters()}
    tied = embedding.weight.grad
    assert tied is not None and bool((tied != 0).all())


def test_frozen_parts() -> None:
    head = Head()
    h, labels, ctx = batch()
    everything = run("plain", head, h, labels, ctx)
    head.proj.requires_grad_(False)
    found = run("chunked", head, h, labels, ctx)
    assert len(found) == 3 and head.proj.weight.grad is None
    torch.testing.assert_close(found[1], everything[1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found[2], everything[2], atol=1e-6, rtol=1e-5)
    # the blocks below are frozen too: only the head learns
    head.zero_grad()
    head.proj.requires_grad_(True)
    select_ops().linear_cross_entropy(head, h, labels, ctx).backward()
    assert head.proj.weight.grad is not None
    torch.testing.assert_close(head.proj.weight.grad, everything[3], atol=1e-6, rtol=1e-5)


def test_without_gradients() -> None:
    head = Head()
    h, labels, ctx = batch()
    with torch.no_grad():
        loss = select_ops().linear_cross_entropy(head, h, labels, ctx)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, run("plain", head, h, labels, ctx)[0])


def test_no_whole_matrix_of_logits() -> None:
    """The widest tensor that the head ever sees is one chunk."""
    head = Head()
    seen: list[int] = []
    head.proj.register_forward_hook(lambda _, inputs, output: seen.append(output.numel()))
    h, labels, ctx = batch(0.0, rows=4, length=50)
    run("chunked", head, h, labels, ctx)
    assert len(seen) > 10 and max(seen) <= 3 * VOCABULARY
