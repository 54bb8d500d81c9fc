"""Rotary positions against transformers, for every scaling it has, and the refusals of bad settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.codegen.modeling_codegen import (
    apply_rotary_pos_emb as interleaved_rotation,
)
from transformers.models.codegen.modeling_codegen import create_sinusoidal_positions
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from collie_core.errors import ConfigError
from collie_core.ops import Context
from collie_models.decoder.config_reader import ConfigReader
from collie_models.decoder.rope_config import read_rotary
from collie_models.decoder.rotary import Rotary

DIM = 16
TYPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 24,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn_mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 0.7,
        "mscale_all_dim": 1.2,
        "truncate": False,
    },
    "yarn_factor": {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 0.8,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0 + 0.1 * n for n in range(DIM // 2)],
        "long_factor": [1.0 + 0.9 * n for n in range(DIM // 2)],
    },
}


def stock(parameters: dict[str, Any], positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    config = LlamaConfig(
        hidden_size=4 * DIM, num_attention_heads=4, max_position_embeddings=64, rope_parameters=parameters
    )
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    return cos, sin


@pytest.mark.parametrize("length", [10, 64, 100])
@pytest.mark.parametrize("theta", [10000.0, 500.0])
@pytest.mark.parametrize("name", sorted(TYPES))
def test_equals_transformers(name: str, theta: float, length: int) -> None:
    positions = torch.arange(length).unsqueeze(0)
    cos, sin = stock(TYPES[name] | {"rope_theta": theta}, positions)
    hf_config = {"rope_theta": theta, "rope_scaling": TYPES[name]}  # as transformers 4 writes it
    rotary = read_rotary(ConfigReader(hf_config), DIM, 64)
    ctx = Context.build(torch.zeros(1, length, dtype=torch.int64))
    found_cos, found_sin = rotary.angles(ctx)
    torch.testing.assert_close(found_cos[:, 0], cos[..., : DIM // 2], atol=3e-5, rtol=1e-5)
    torch.testing.assert_close(found_sin[:, 0], sin[..., : DIM // 2], atol=3e-5, rtol=1e-5)
    q, k = torch.randn(2, 3, length, DIM), torch.randn(2, 1, length, DIM)
    expected = apply_rotary_pos_emb(q, k, cos, sin)
    for x, rotated in zip((q, k), expected, strict=True):
        torch.testing.assert_close(rotary.rotate(x, found_cos, found_sin), rotated, atol=2e-4, rtol=1e-5)


def test_both_spellings_are_one() -> None:
    for parameters in TYPES.values():
        old = {"rope_theta": 500.0, "rope_scaling": parameters | {"type": parameters["rope_type"]}}
        new = {"rope_parameters": parameters | {"rope_theta": 500.0}}
        assert read_rotary(ConfigReader(old), DIM, 64) == read_rotary(ConfigReader(new), DIM, 64)
    assert read_rotary(ConfigReader({}), DIM, 64) == Rotary(DIM, 10000.0)
    assert read_rotary(ConfigReader({"rope_scaling": None}), DIM, 64) == Rotary(DIM, 10000.0)


def test_spellings_that_differ_are_refused() -> None:
    """transformers takes rope_scaling then, and the base beside it."""
    both = {"rope_scaling": TYPES["yarn"], "rope_parameters": TYPES["yarn"] | {"rope_theta": 500.0}}
    with pytest.raises(ConfigError, match="rope_parameters and rope_scaling are both given and differ"):
        read_rotary(ConfigReader(both), DIM, 64)
    assert read_rotary(ConfigReader(both | {"rope_theta": 500.0}), DIM, 64).theta == 500.0
    with pytest.raises(ConfigError, match="both given and differ"):
        read_rotary(ConfigReader(both | {"rope_parameters": {"rope_type": "default"}}), DIM, 64)
    unset = both | {"rope_scaling": None}
    assert read_rotary(ConfigReader(unset), DIM, 64).theta == 500.0


def test_finetuned_changes_nothing() -> None:
    """Of the checkpoints that the authors of YaRN released."""
    stated = {"rope_scaling": TYPES["yarn"] | {"finetuned": True}}
    assert read_rotary(ConfigReader(stated), DIM, 64) == read_rotary(
        ConfigReader({"rope_scaling": TYPES["yarn"]}), DIM, 64
    )


def test_the_top_level_original_length_goes_before() -> None:
    hf_config = {"rope_scaling": TYPES["yarn"], "original_max_position_embeddings": 8}
    assert read_rotary(ConfigReader(hf_config), DIM, 64).scaling.original_max_positions == 8  # type: ignore[attr-defined]


def test_interleaved_and_partial_equal_codegen() -> None:
    rotary = Rotary(8, interleaved=True)
    x = torch.randn(2, 3, 10, DIM)
    ctx = Context.build(torch.zeros(2, 10, dtype=torch.int64))
    found = rotary.rotate(x, *rotary.angles(ctx))
    table = create_sinusoidal_positions(10, 8)[None]
    sin, cos = table.split(4, -1)
    expected = interleaved_rotation(x[..., :8].transpose(1, 2), sin, cos).transpose(1, 2)
    torch.testing.assert_close(found[..., :8], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(found[..., 8:], x[..., 8:])


def test_gives_back_the_dtype_and_computes_in_fp32() -> None:
    rotary = Rotary(DIM)
    ctx = Context.build(torch.zeros(1, 600, dtype=torch.int64))
    cos, sin = rotary.angles(ctx)
    assert cos.dtype == torch.float32
    x = torch.randn(1, 1, 600, DIM)
    found = rotary.rotate(x.bfloat16(), cos, sin)
    assert found.dtype == torch.bfloat16
    exact = rotary.rotate(x.bfloat16().float(), cos, sin)
    assert torch.equal(found, exact.bfloat16())  # one rounding alone


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (
            {"rope_type": "lineer", "factor": 2.0},
            "rope_type: 'lineer' is not supported, did you mean 'linear'",
        ),
        ({"rope_type": "linear"}, "factor is missing; expected a positive number"),
        ({"rope_type": "linear", "factor": "2"}, "factor: '2' is not a positive number"),
        (
            {"rope_type": "linear", "factor": 2.0, "facter": 3.0},
            "unknown key 'facter', did you mean 'factor'",
        ),
        (
            {"rope_type": "default", "partial_rotary_factor": 0.5},
            "partial_rotary_factor: 0.5 is not supported",
        ),
        (TYPES["longrope"] | {"long_factor": [1.0]}, "long_factor: .* is not a list of 8 numbers"),
        (TYPES["llama3"] | {"high_freq_factor": 0.5}, "high_freq_factor: 0.5 is not above low_freq_factor"),
    ],
)
def test_bad_settings_are_refused_by_name(rope: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_rotary(ConfigReader({"rope_scaling": rope}), DIM, 64)
