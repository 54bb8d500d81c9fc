"""What tensor and pipeline parallelism may cut, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from layout_jobs import Training, run_job
from torch import nn

from collie_core.errors import ConfigError, PluginError
from collie_core.layouts.native import NativeLayoutPlugin
from collie_core.layouts.ties import check_ties, tied_over_ends
from collie_core.layouts.zero import shard
from collie_core.models.buffers import cast, persistent_buffers
from collie_core.plugin import ParallelPlan

APART = {name: name for name in ("embed.words.weight", "blocks.a.w", "blocks.b.w", "head.out.weight")}
STRETCHES = [range(0, 1), range(1, 2)]


def test_a_cut_embedding_keeps_its_padding_and_what_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    run_job(tmp_path, "tp2", [Training({"output_dir": str(tmp_path / "found")}, ["call cut_embeddings"])])
    for rank in (0, 1):
        norm, scaled = json.loads((tmp_path / f"found.{rank}.json").read_text())
        assert "cuts embed, an embedding with max_norm" in norm
        assert "cuts embed, a Scaled; only nn.Linear and nn.Embedding themselves" in scaled


@pytest.mark.parametrize(
    "names", [("embed.words.weight", "head.out.weight"), ("head.out.weight", "embed.words.weight")]
)
def test_embedding_and_head_may_be_tied_whichever_comes_first(names: tuple[str, str]) -> None:
    first, second = names
    assert tied_over_ends(APART | {second: first}, ["a", "b"], STRETCHES) == {first}
    assert tied_over_ends(APART, ["a", "b"], STRETCHES) == set()


def test_other_ties_between_stages_are_refused() -> None:
    ties = APART | {"blocks.b.w": "blocks.a.w"}
    with pytest.raises(PluginError, match=r"blocks\.b\.w is tied to blocks\.a\.w.*pp_size 2"):
        tied_over_ends(ties, ["a", "b"], STRETCHES)
    assert tied_over_ends(ties, ["a", "b"], [range(0, 2), range(2, 2)]) == set()


def test_a_plan_ties_what_the_module_ties() -> None:
    plan = ParallelPlan(tied=(("embed.words.weight", "head.out.weight"),))
    check_ties(plan, APART | {"head.out.weight": "embed.words.weight"})
    with pytest.raises(PluginError, match="they are two parameters"):
        check_ties(plan, APART)
    with pytest.raises(PluginError, match=r"the module has no head\.out\.weight"):
        check_ties(plan, {"embed.words.weight": "embed.words.weight"})


def test_zero_refuses_a_parameter_without_dimensions_by_name() -> None:
    stage: Any = nn.Linear(2, 2)
    stage.scale = nn.Parameter(torch.tensor(1.0))
    grid: Any = None  # not asked before
    with pytest.raises(ConfigError, match="cannot cut scale, .* set zero_stage: 0"):
        shard(stage, grid, NativeLayoutPlugin.Options(zero_stage=3))


def test_only_what_a_checkpoint_holds_is_cast() -> None:
    """Rotary frequencies in bf16 would put long sequences in wrong places."""
    model = nn.Linear(2, 2)
    model.register_buffer("kept", torch.ones(2))
    model.register_buffer("made", torch.ones(2), persistent=False)
    cast(model, torch.bfloat16)
    assert {name: t.dtype for name, t in (*model.named_parameters(), *model.named_buffers())} == {
        "weight": torch.bfloat16,
        "bias": torch.bfloat16,
        "kept": torch.bfloat16,
        "made": torch.float32,
    }
    assert list(persistent_buffers(model)) == ["kept"]
