"""What each way of recomputing computes twice, compiled or not, and that it changes no gradient."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from collie_core import CollieConfig
from collie_core.layouts.recompute import BlockSizes, measured, runner_for
from collie_core.ops import Context
from collie_core.run import Run

LAYERS = 3
RUNS: Counter[str] = Counter()  # how often the kernel of each operator below ran


def operator(name: str) -> Any:
    """x -> sin(x), counting."""

    @torch.library.custom_op(f"collie_test::{name}", mutates_args=())
    def forward(x: Tensor) -> Tensor:
        RUNS[name] += 1
        return x.sin()

    forward.register_fake(torch.empty_like)
    forward.register_autograd(
        lambda ctx, gradient: gradient * ctx.saved_tensors[0].cos(),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )
    return forward


attention, other = operator("attention"), operator("other")


class Block(nn.Module):
    """Has an operator that is attention by its name, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, h: Tensor, ctx: Context) -> Tensor:
        return h + self.second(other(attention(self.first(h)) * ctx.positions.unsqueeze(-1)))


def outcome(mode: str | int, compiled: bool) -> tuple[list[Tensor], Counter[str]]:
    """Gradients of a step under a mode, and how often each operator ran in it."""
    torch.manual_seed(0)
    blocks: list[nn.Module] = [Block() for _ in range(LAYERS)]
    config = CollieConfig(model={"path": "none"}, train={"activation_checkpointing": mode})
    run = Run(config, Path("none"), torch.device("cpu"))
    run.resolved["compile"] = compiled
    if compiled:
        torch._dynamo.reset()
        for block in blocks:
            block.compile()
    run_blocks = runner_for(blocks, run)
    RUNS.clear()
    run_blocks(torch.ones(2, 4, 8), Context.build(torch.zeros(2, 4, dtype=torch.int64))).sum().backward()
    return [p.grad for block in blocks for p in block.parameters() if p.grad is not None], RUNS.copy()


@pytest.mark.parametrize(
    ("mode", "compiled", "attentions", "others"),
    [
        ("none", False, LAYERS, LAYERS),
        ("full", False, 2 * LAYERS, 2 * LAYERS),
        ("full", True, 2 * LAYERS, 2 * LAYERS),
        (2, True, LAYERS + 2, LAYERS + 2),
        ("selective", False, LAYERS, 2 * LAYERS),
        ("selective", True, LAYERS, 2 * LAYERS),
        (2, False, LAYERS + 2, LAYERS + 2),
        ("offload", False, 2 * LAYERS, 2 * LAYERS),
    ],
)
def test_what_is_computed_twice(mode: str | int, compiled: bool, attentions: int, others: int) -> None:
    plain, _ = outcome("none", False)
    found, runs = outcome(mode, compiled)
    assert runs == {"attention": attentions, "other": others}
    assert len(found) == len(plain) == 4 * LAYERS
    for one, expected in zip(found, plain, strict=True):
        torch.testing.assert_close(one, expected)


@pytest.mark.parametrize(
    ("usable", "alive", "begun", "recomputed"),
    [
        (100 + 4 * 10 + 4 * 90, 1, 0, 0),
        (100 + 4 * 10 + 4 * 90 - 1, 1, 0, 1),
        (100 + 4 * 10 + 90, 1, 0, 3),
        (100 + 4 * 10, 1, 0, 4),
        (0, 1, 0, 4),
        (100 + 2 * (4 * 10 + 3 * 90), 2, 0, 1),  # two passes alive: each keeps three blocks
        (100 + 4 * 10 + 3 * 90, 2, 1, 1),  # the first has what it needs
    ],
)
def test_as_few_as_fit_are_recomputed(usable: int, alive: int, begun: int, recomputed: int) -> None:
    assert BlockSizes(everything=100, input=10).recomputed(4, usable, alive, begun) == recomputed


@pytest.mark.parametrize("above", ["trained embeddings", "frozen embeddings"])
def test_a_block_counts_as_one_that_lies_above_trained_ones(above: str) -> None:
    block, h = Block(), torch.randn(2, 5, 8, requires_grad=above == "trained embeddings")
    for frozen in (block.first.weight, block.first.bias):  # then `first` keeps nothing for their gradients
        frozen.requires_grad_(False)
    context = Context.build(torch.zeros(2, 5, dtype=torch.long))
    found = measured(block, h, context)
    assert found.input == h.nbytes
    # inputs of the two operators and of `second`, and the positions, 5 of int64
    assert found.everything == 3 * h.nbytes + 5 * 8


def test_sizes_grow_with_the_largest_batch_and_never_shrink() -> None:
    assert BlockSizes(100, 10).times(2.5) == BlockSizes(250, 25)
    assert BlockSizes(100, 10).times(0.5) == BlockSizes(100, 10)
