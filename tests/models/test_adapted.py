"""Linears and embeddings that adapters change: what stays of the plain ones, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from collie_core.errors import ConfigError
from collie_core.plugin import Delta, adapt_embedding, add_delta


class Added(nn.Module):
    """Adds one vector to every other."""

    def __init__(self) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.ones(3))

    def forward(self, ids: Tensor, vectors: Tensor) -> Tensor:
        return vectors + self.vector


class Scaled(nn.Embedding):
    """An embedding that computes something of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2.0 * super().forward(input)


class Negated(nn.Linear):
    """A linear that computes something of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return -super().forward(input)


def model_with(module: nn.Module) -> Any:
    """A module whose `part` it is."""
    model = nn.Module()
    model.part = module
    return model


def test_the_padding_of_an_adapted_embedding_stays() -> None:
    torch.manual_seed(0)
    plain = nn.Embedding(7, 3, padding_idx=5)
    model = model_with(nn.Embedding(7, 3, padding_idx=5))
    model.part.weight = nn.Parameter(plain.weight.detach().clone())
    for name in ("one", "two"):
        adapt_embedding(model, "part", name, Added())
    ids = torch.tensor([[0, 5, 6, 5]])
    found, expected = model.part(ids), plain(ids) + 2.0
    assert torch.equal(found, expected)
    for out in (found, expected):
        out.square().sum().backward()
    assert plain.weight.grad is not None and plain.weight.grad[0].any() and not plain.weight.grad[5].any()
    assert torch.equal(model.part.weight.grad, plain.weight.grad)


@pytest.mark.parametrize(
    ("module", "what"),
    [
        (nn.Embedding(7, 3, max_norm=1.0), "an embedding with max_norm"),
        (nn.Embedding(7, 3, scale_grad_by_freq=True), "an embedding with scale_grad_by_freq"),
        (nn.Embedding(7, 3, sparse=True), "an embedding with sparse"),
        (Scaled(7, 3), "a Scaled"),
        (nn.Linear(7, 3), "a Linear"),
    ],
)
def test_an_embedding_that_would_change_is_refused(module: nn.Module, what: str) -> None:
    model = model_with(module)
    with pytest.raises(ConfigError, match=f"part is {what}, which adapters cannot change"):
        adapt_embedding(model, "part", "one", Added())
    assert model.part is module


def test_a_linear_that_would_change_is_refused() -> None:
    model = model_with(Negated(3, 7))
    with pytest.raises(ConfigError, match="part is a Negated, which adapters cannot change"):
        add_delta(model, "part", "one", Delta())
