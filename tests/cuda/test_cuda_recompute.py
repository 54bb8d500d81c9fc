"""Ways of recomputing on a CUDA device: the same gradients, and the memory that each promises."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from collie_core import CollieConfig
from collie_core.layouts.offload import Offloaded
from collie_core.layouts.recompute import runner_for
from collie_core.models.causal_lm import CausalLM
from collie_core.ops import Context, Ops, select_ops
from collie_core.ops.context import Records
from collie_core.run import Run
from collie_models.decoder.config import DecoderConfig
from collie_models.decoder.model import Decoder
from collie_models.decoder.rotary import Rotary

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CUDA = torch.device("cuda")
LAYERS, ROWS, LENGTH, WIDTH = 6, 2, 1024, 512


def make() -> tuple[CausalLM, Ops]:
    deterministic = torch.are_deterministic_algorithms_enabled()
    ops = select_ops(device=CUDA, dtype=torch.bfloat16, deterministic=deterministic)
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=50,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_layers=LAYERS,
        num_heads=4,
        num_kv_heads=4,
        head_dim=128,
        rotary=Rotary(128),
    )
    return Decoder(config, ops).to(device=CUDA, dtype=torch.bfloat16), ops


def context(packed: bool) -> Context:
    ids = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) % 50
    if not packed:
        return Context.build(ids.to(CUDA))
    segments = (torch.arange(LENGTH) // 300 + 1).expand(ROWS, -1)
    records = Records.of(segments)
    on_device = Records(records.starts.to(CUDA), records.longest)
    return Context.build(ids.to(CUDA), segments=segments.to(CUDA), records=on_device)


def outcome(
    mode: str, compiled: bool, packed: bool, steps: int = 3
) -> tuple[list[Tensor], int, list[int]]:
    """(gradients of the last step, its peak memory beside weights, bytes in host memory after each step)."""
    model, ops = make()
    run = Run(
        CollieConfig(model={"path": "none"}, train={"activation_checkpointing": mode}), Path("none"), CUDA
    )
    run.resolved["compile"] = compiled
    blocks = list(model.blocks.values())
    torch._dynamo.reset()
    if compiled:
        for block in blocks:
            block.compile()
    run_blocks, host = runner_for(blocks, run), []
    for _ in range(steps):
        model.zero_grad(set_to_none=True)
        ctx = model.prepare_context(context(packed))
        ops.prepare(ctx)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = run_blocks(model.embed(ctx.input_ids, ctx), ctx)
        held = torch.cuda.memory_allocated() - before
        out.float().square().mean().backward()
        del out
        host.append(run_blocks.host_bytes if isinstance(run_blocks, Offloaded) else 0)
    torch.cuda.synchronize()
    return [p.grad for p in model.parameters() if p.grad is not None], held, host


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mode", ["full", "selective", "offload"])
def test_gradients_are_the_same(mode: str, compiled: bool, packed: bool) -> None:
    plain, everything, _ = outcome("none", compiled, packed)
    found, held, _ = outcome(mode, compiled, packed)
    for one, expected in zip(found, plain, strict=True):
        apart = (one.float() - expected.float()).norm() / expected.float().norm()
        assert float(apart) < 0.02
    assert held < 0.5 * everything


def test_what_is_held_on_the_device() -> None:
    """In inputs of a block: a few under offload, one a block under full, two a block under selective."""
    size = ROWS * LENGTH * WIDTH * 2
    for compiled in (False, True):
        modes = ("none", "offload", "full", "selective")
        held = {mode: outcome(mode, compiled, True)[1] / size for mode in modes}
        assert held["offload"] < held["none"] / LAYERS + 5, held  # the last block keeps all
        assert LAYERS - 1 <= held["full"] < LAYERS + 3, held
        assert 2 * LAYERS - 1 <= held["selective"] < 2.3 * LAYERS + 3, held


def test_offload_gives_the_numbers_of_full_and_uses_its_buffers_again() -> None:
    """Bit by bit: copies move numbers and nothing else."""
    torch.use_deterministic_algorithms(True)
    try:
        full, _, _ = outcome("full", False, True)
        found, _, host = outcome("offload", False, True, steps=6)
    finally:
        torch.use_deterministic_algorithms(False)
    size = ROWS * LENGTH * WIDTH * 2
    assert host == [(LAYERS - 1) * size] * 6  # of every block but the last
    for one, expected in zip(found, full, strict=True):
        assert torch.equal(one, expected)


def test_a_graph_that_is_dropped_gives_its_buffers_back() -> None:
    model, _ = make()
    again = partial(checkpoint, use_reentrant=False)
    run_blocks = Offloaded(list(model.blocks.values()), CUDA, again)
    for _ in range(3):
        ctx = model.prepare_context(context(True))
        out = run_blocks(model.embed(ctx.input_ids, ctx), ctx)
        del out
    assert run_blocks.host_bytes == (LAYERS - 1) * ROWS * LENGTH * WIDTH * 2


def test_auto_recomputes_more_where_states_and_sums_come_later(capfd: pytest.CaptureFixture[str]) -> None:
    """Room for every block at first; before the second step something takes all but that of two."""
    model, ops = make()
    config = CollieConfig(model={"path": "none"}, train={"activation_checkpointing": "auto"})
    run = Run(config, Path("none"), CUDA)
    run.resolved["compile"] = False
    run_blocks = runner_for(list(model.blocks.values()), run)

    def step() -> int:
        ctx = model.prepare_context(context(False))
        ops.prepare(ctx)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        out = run_blocks(model.embed(ctx.input_ids, ctx), ctx)
        held = torch.cuda.memory_allocated() - before
        out.float().square().mean().backward()
        model.zero_grad(set_to_none=True)
        run.step += 1
        return held

    everything = step()
    assert run.resolved["activation_checkpointing"] == 0
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    left = total // 10 + everything // LAYERS * 4  # the margin, a block at work, inputs, and about two blocks
    later = torch.empty(free - left, dtype=torch.uint8, device=CUDA)
    held = step()
    chosen = run.resolved["activation_checkpointing"]
    assert 0 < chosen < LAYERS and held < everything
    del later
    torch.cuda.empty_cache()
    step()
    step()
    assert run.resolved["activation_checkpointing"] == chosen  # settled
    assert capfd.readouterr().err.count("blocks are recomputed") == 2
