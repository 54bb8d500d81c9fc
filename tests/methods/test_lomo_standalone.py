"""LOMO and AdaLomo in a plain PyTorch loop, beside torch's own clipping and descent."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from collie_core.errors import CheckpointError, UserError
from collie_methods.lomo import AdaLomo, Lomo


def llama(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype=dtype)


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 320, (2, 16), generator=generator) for _ in range(count)]


def loss_of(model: Any, ids: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def equal(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lomo_equals_descent_with_torchs_clipping(tiny_llama: Path, clip: float | None, decay: float) -> None:
    ours, reference = llama(tiny_llama), llama(tiny_llama)
    optimizer = Lomo(ours, lr=0.1, clip_grad_norm=clip, weight_decay=decay)
    sgd = torch.optim.SGD(reference.parameters(), lr=0.1, weight_decay=0.0)
    for ids in batches(10):
        optimizer.fused_backward(loss_of(ours, ids))
        loss_of(reference, ids).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(reference.parameters(), clip)
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter.mul_(1 - 0.1 * decay)
        sgd.step()
        sgd.zero_grad()
    for one, other in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_grad_norm_is_torchs_and_is_used_by_the_next_step(tiny_llama: Path) -> None:
    ours, own = llama(tiny_llama), llama(tiny_llama)
    asked, implied = Lomo(ours, clip_grad_norm=0.5), Lomo(own, clip_grad_norm=0.5)
    [ids] = batches(1)
    reference = llama(tiny_llama)
    loss_of(reference, ids).backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in reference.parameters()])
    loss = loss_of(ours, ids)
    torch.testing.assert_close(asked.grad_norm(loss), expected)
    asked.fused_backward(loss)
    implied.fused_backward(loss_of(own, ids))
    assert equal(ours, own) and not equal(ours, reference)


def test_the_rate_of_a_step(tiny_llama: Path) -> None:
    one, other = llama(tiny_llama), llama(tiny_llama)
    first, second = Lomo(one, lr=0.5), Lomo(other, lr=0.1)
    [ids] = batches(1)
    first.fused_backward(loss_of(one, ids))
    second.fused_backward(loss_of(other, ids), lr=0.5)
    assert equal(one, other) and second.lr == 0.5


class LiveGradients:
    """The most gradients (and bytes of them) that were alive at any parameter's hook."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = list(model.parameters())
        self.most = 0
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(self.count)

    def count(self, parameter: Tensor) -> None:
        self.most = max(self.most, sum(p.grad is not None for p in self.parameters))


@pytest.mark.parametrize("kind", [Lomo, AdaLomo])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_at_most_three_gradients_are_alive(tiny_llama: Path, kind: Any, clip: float | None) -> None:
    model = llama(tiny_llama)
    counter = LiveGradients(model)  # its hooks run before the optimizer's
    optimizer = kind(model, clip_grad_norm=clip)
    [ids] = batches(1)
    optimizer.fused_backward(loss_of(model, ids))
    assert 1 <= counter.most <= 3
    assert all(p.grad is None for p in model.parameters())
    optimizer.close()
    with pytest.raises(UserError, match="this optimizer is closed"):
        optimizer.fused_backward(loss_of(model, ids))
    loss_of(model, ids).backward()
    assert counter.most == len(counter.parameters)  # the counter can tell


@pytest.mark.parametrize("kind", [Lomo, AdaLomo])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_step_that_is_not_finite_is_skipped(tiny_llama: Path, kind: Any, clip: float | None) -> None:
    model = llama(tiny_llama)
    optimizer = kind(model, clip_grad_norm=clip)
    first, second = batches(2)
    optimizer.fused_backward(loss_of(model, first))
    before = {
        name: tensor.clone() for name, tensor in {**model.state_dict(), **optimizer.state_dict()}.items()
    }
    optimizer.fused_backward(loss_of(model, second) * float("nan"))
    after = {**model.state_dict(), **optimizer.state_dict()}
    changed = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    assert changed == ["step"]
    optimizer.fused_backward(loss_of(model, second))
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])


def test_without_clipping_a_bad_gradient_stops_its_parameter_alone() -> None:
    model = nn.Linear(2, 2)
    before = model.bias.detach().clone()
    weight = model.weight.detach().clone()
    optimizer = Lomo(model, lr=0.1)
    out = model(torch.ones(2))
    loss = out.sum() + (model.bias * 0).sqrt().sum()  # an infinite gradient times zero: NaN in the bias
    optimizer.fused_backward(loss)
    assert torch.equal(model.bias, before)
    torch.testing.assert_close(model.weight, weight - 0.1)


def test_ordinary_backward_still_collects_gradients(tiny_llama: Path) -> None:
    model = llama(tiny_llama)
    optimizer = Lomo(model)
    [ids] = batches(1)
    optimizer.fused_backward(loss_of(model, ids))
    loss_of(model, ids).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clip", [None, 0.1, 100.0])
def test_what_ordinary_backward_accumulated_counts_in_the_step(
    dtype: torch.dtype, clip: float | None
) -> None:
    torch.manual_seed(0)
    ours = nn.ModuleList([nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 1)]).to(dtype)
    reference = deepcopy(ours).float()
    x = torch.randn(2, 3, 4).to(dtype)

    def losses(model: nn.ModuleList) -> Iterator[Tensor]:
        """Of three micro-batches; the last does not reach the third linear."""

        def hidden(one: Tensor) -> Tensor:
            result: Tensor = model[1](model[0](one.to(next(model.parameters()).dtype)).tanh())
            return result

        yield model[2](hidden(x[0])).float().square().mean()
        yield hidden(x[1]).float().square().mean() / 2
        yield hidden(x[0]).float().square().mean()

    optimizer = Lomo(ours, lr=0.5, clip_grad_norm=clip)
    next(losses(ours)).backward()
    ours.zero_grad()  # and it does not
    *earlier, last = losses(ours)
    for loss in earlier:
        loss.backward()
    norm = optimizer.grad_norm(last)
    optimizer.fused_backward(last)
    assert all(p.grad is None for p in ours.parameters())
    torch.stack(list(losses(reference))).sum().backward()
    expected = nn.utils.clip_grad_norm_(reference.parameters(), clip or 1e9)
    torch.optim.SGD(reference.parameters(), lr=0.5).step()
    rtol, atol = (1e-5, 1e-6) if dtype == torch.float32 else (2e-2, 1e-2)
    torch.testing.assert_close(norm, expected, rtol=rtol, atol=atol)
    for one, other in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one.float(), other, rtol=rtol, atol=atol)


def test_frozen_parameters_and_tied_weights() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    ours = LlamaForCausalLM(config)
    ours.model.norm.weight.requires_grad_(False)
    reference = LlamaForCausalLM(config)
    reference.load_state_dict(ours.state_dict())
    reference.model.norm.weight.requires_grad_(False)
    ids = torch.arange(20).view(2, 10)
    optimizer = Lomo(ours, lr=0.1)
    sgd = torch.optim.SGD([p for p in reference.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.fused_backward(loss_of(ours, ids))
        loss_of(reference, ids).backward()
        sgd.step()
        sgd.zero_grad()
    for one, other in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight


@pytest.mark.parametrize("kind", [Lomo, AdaLomo])
def test_bfloat16_resumes_bit_for_bit(tiny_llama: Path, kind: Any) -> None:
    straight = llama(tiny_llama, torch.bfloat16)
    optimizer = kind(straight, lr=0.05, seed=9)
    steps = batches(6)
    for ids in steps[:3]:
        optimizer.fused_backward(loss_of(straight, ids))
    resumed = llama(tiny_llama, torch.bfloat16)
    resumed.load_state_dict(straight.state_dict())
    other = kind(resumed, lr=0.05, seed=9)
    other.load_state_dict({name: tensor.clone() for name, tensor in optimizer.state_dict().items()})
    for ids in steps[3:]:
        optimizer.fused_backward(loss_of(straight, ids))
        other.fused_backward(loss_of(resumed, ids))
    assert equal(straight, resumed)


def test_mistakes_are_refused(tiny_llama: Path) -> None:
    with pytest.raises(UserError, match="float16"):
        Lomo(llama(tiny_llama, torch.float16))
    model = llama(tiny_llama)
    with pytest.raises(CheckpointError, match=r"did you mean|belongs to no parameter"):
        AdaLomo(model).load_state_dict({"lm_haed.weight.row": torch.zeros(3), "step": torch.tensor(1)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"lr: expected a number > 0, got -1\.0"),
        ({"lr": float("nan")}, "lr: expected a number > 0, got nan"),
        ({"clip_grad_norm": -1.0}, "clip_grad_norm: expected a number > 0"),
        ({"clip_grad_value": 0.0}, "clip_grad_value: expected a number > 0"),
        ({"weight_decay": -0.1}, "weight_decay: expected a number >= 0"),
    ],
)
@pytest.mark.parametrize("kind", [Lomo, AdaLomo])
def test_numbers_without_a_meaning_are_refused(kind: Any, options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        kind(nn.Linear(2, 2), **options)


def test_models_and_states_that_it_cannot_serve_are_refused() -> None:
    with pytest.raises(UserError, match="weight is float64, expected float32 or bfloat16"):
        AdaLomo(nn.Linear(2, 2, dtype=torch.float64))
    with pytest.raises(UserError, match="no parameter to train"):
        Lomo(nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(CheckpointError, match="step is missing"):
        Lomo(nn.Linear(2, 2)).load_state_dict({})
    optimizer = Lomo(model := nn.Linear(2, 2))
    with pytest.raises(UserError, match="lr: expected a number >= 0"):
        optimizer.fused_backward(model(torch.ones(1, 2)).sum(), lr=-0.1)
