"""Beside the authors' package lomo-optim, on the same model and data: equal results."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import lomo_optim
import pytest
import torch
from torch import Tensor

from collie_methods.lomo import AdaLomo, Lomo

Step = Callable[[Tensor], None]


@pytest.fixture(autouse=True)
def cuda_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's AdaLomo makes its state with `.cuda()`; nothing else in it needs a GPU."""
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=12,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (2, 16), generator=generator) for _ in range(10)]


def pair(model: Any, name: str, lr: float, clip: float | None) -> tuple[Any, Step, Any, Step]:
    """(our model, our step, their model, their step)."""
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    mine = {"lomo": Lomo, "adalomo": AdaLomo}[name](ours, lr=lr, clip_grad_norm=clip)
    peer = {"lomo": lomo_optim.Lomo, "adalomo": lomo_optim.AdaLomo}[name](theirs, lr=lr, clip_grad_norm=clip)

    def our_step(ids: Tensor) -> None:
        mine.fused_backward(ours(input_ids=ids, labels=ids).loss)

    def their_step(ids: Tensor) -> None:
        loss = theirs(input_ids=ids, labels=ids).loss
        if clip is not None:
            peer.grad_norm(loss)
        peer.fused_backward(loss, lr)

    return ours, our_step, theirs, their_step


CASES = [("lomo", 0.1, None), ("lomo", 0.3, 0.5), ("adalomo", 0.01, None)]


@pytest.mark.parametrize("name, lr, clip", CASES)
def test_equal_parameters_after_ten_steps(model: Any, name: str, lr: float, clip: float | None) -> None:
    ours, our_step, theirs, their_step = pair(model, name, lr, clip)
    for ids in batches():
        our_step(ids)
        their_step(ids)
    moved = 0.0
    for one, other, start in zip(ours.parameters(), theirs.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
        moved = max(moved, float((one - start).detach().abs().max()))
    assert moved > 1e-3
