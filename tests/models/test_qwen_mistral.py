"""Qwen2, Qwen3 and Mistral against transformers' own classes: logits, loss, gradients, generation, saving."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM as StockModel
from transformers import MistralConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from collie_core import AutoModelForCausalLM, AutoTokenizer
from collie_core.errors import CheckpointError, ConfigError
from collie_core.models.causal_lm import run_blocks
from collie_core.ops import Context
from collie_models.decoder.config import DecoderConfig
from collie_models.mistral import MistralForCausalLM
from collie_models.mistral.provider import MistralProvider
from collie_models.qwen import Qwen2ForCausalLM, Qwen3ForCausalLM
from collie_models.qwen.provider import Qwen2Provider, Qwen3Provider

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
CASES: dict[str, PreTrainedConfig] = {
    "qwen2": Qwen2Config(**SIZES),
    "qwen2-tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2-yarn": Qwen2Config(**SIZES, rope_parameters=YARN),
    "qwen2-window-unused": Qwen2Config(**SIZES, sliding_window=3, use_sliding_window=False),
    "qwen3": Qwen3Config(**SIZES, head_dim=12),
    "qwen3-tied": Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True, rms_norm_eps=1e-3),
    "qwen3-biases-yarn": Qwen3Config(**SIZES, head_dim=8, attention_bias=True, rope_parameters=YARN),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "mistral-window": MistralConfig(**SIZES, sliding_window=5),
    "mistral-tied-linear": MistralConfig(**SIZES, tie_word_embeddings=True, rope_parameters=LINEAR),
    "mistral-head-dim": MistralConfig(**SIZES, head_dim=12, sliding_window=4),
}
CLASSES = {"qwen2": Qwen2ForCausalLM, "qwen3": Qwen3ForCausalLM, "mistral": MistralForCausalLM}


def save_stock(folder: Path, config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = StockModel.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model


def ids(length: int = 12) -> Tensor:
    return torch.randint(1, 96, (2, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case", sorted(CASES))
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_loss_and_gradients(case: str, side: str, tmp_path: Path) -> None:
    stock = save_stock(tmp_path, CASES[case])
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(model) is CLASSES[case.split("-")[0]]
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :4] = 0
    mask = mask if side == "left" else mask.flip(1)
    labels = ids(20).masked_fill(mask == 0, -100)
    if side == "left":
        labels[0, 4] = -100  # predicted from a padding position, which has no meaning
    expected, found = (m(ids(20), attention_mask=mask, labels=labels) for m in (stock, model))
    torch.testing.assert_close(found.logits[mask.bool()], expected.logits[mask.bool()], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-5, rtol=1e-5)
    expected.loss.backward()
    found.loss.backward()
    stock_gradients = {name: p.grad for name, p in stock.named_parameters()}
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert len(gradients) == len(stock_gradients) and model.origin is not None
    for rule in model.origin.provider.weight_map(model.origin.config):
        if rule.targets and rule.targets[0] in gradients:
            for name, gradient in rule.save(gradients).items():  # type: ignore[arg-type]
                torch.testing.assert_close(gradient, stock_gradients[name], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("case", sorted(CASES))
def test_generation_packing_and_saving(case: str, tmp_path: Path) -> None:
    stock = save_stock(tmp_path, CASES[case])
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    kept = {
        "max_new_tokens": 8,
        "min_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    expected = stock.generate(input_ids=ids(), attention_mask=mask, **kept)  # type: ignore[operator]
    assert torch.equal(model.generate(ids(), mask, max_new_tokens=8, eos_token_id=-1), expected)
    row, segments = ids()[:1], torch.tensor([[1] * 5 + [2] * 7])
    ctx = Context.build(row, segments=segments)
    packed = model.head(run_blocks(model, row, ctx), ctx)
    single = torch.cat([model(row[:, :5]).logits, model(row[:, 5:]).logits], 1)
    torch.testing.assert_close(packed, single, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    written, saved = (load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "saved"))
    assert written.keys() == saved.keys()
    assert all(torch.equal(written[name], saved[name]) for name in saved)
    again = StockModel.from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(again(ids()).logits, stock(ids()).logits)


def test_defaults_are_those_of_transformers() -> None:
    least = {key: SIZES[key] for key in ("vocab_size", "intermediate_size", "num_hidden_layers")}
    least |= {"hidden_size": 2048, "num_attention_heads": 32}
    for provider, stock in (
        (Qwen2Provider(), Qwen2Config(**least)),
        (Qwen3Provider(), Qwen3Config(**least)),
        (MistralProvider(), MistralConfig(**least)),
    ):
        config: DecoderConfig = provider.read_config(least)
        assert config.num_kv_heads == stock.num_key_value_heads
        assert config.head_dim == (getattr(stock, "head_dim", None) or 64)
        assert config.norm_eps == stock.rms_norm_eps and not config.tie_embeddings
        assert config.window == (4096 if isinstance(stock, MistralConfig) else None)


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        (
            "qwen2",
            {"use_sliding_window": True, "max_window_layers": 1},
            "use_sliding_window: true.*provider: hf",
        ),
        (
            "qwen3",
            {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 2},
            "use_sliding_window",
        ),
        ("qwen3", {"attention_dropout": 0.1}, "attention_dropout: 0.1 is not supported"),
        ("mistral", {"sliding_window": "4096"}, "sliding_window: '4096' is not a positive whole number"),
        ("mistral", {"num_attention_heads": 5, "head_dim": 8}, "num_attention_heads 5 is no multiple"),
        ("qwen2", {"hidden_act": "silo"}, "hidden_act: 'silo' is not supported, did you mean 'silu'"),
    ],
)
def test_bad_configs_are_refused_by_name(model_type: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AutoModelForCausalLM.from_config({"model_type": model_type, **SIZES, **changes})


@pytest.mark.parametrize("case", ["qwen2", "qwen3", "mistral"])
def test_tokenizers(case: str, tmp_path: Path, make_tokenizer: Callable[[], Any]) -> None:
    CASES[case].save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no tokenizer: expected .*tokenizer.json"):
        AutoTokenizer.from_pretrained(tmp_path)
    made = make_tokenizer()
    made.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "Grüße, 世界!  two  spaces\n"
    assert loaded(text)["input_ids"] == made(text)["input_ids"] and loaded.is_fast


@pytest.mark.parametrize("package", ["qwen", "mistral", "hf"])
def test_plugins_are_light_to_import(package: str) -> None:
    code = f"import sys, collie_models.{package}; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
