"""What the families' configs refuse, by name, and what they take from their original's defaults."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from chatglm_formulas import CONFIG_1, CONFIG_2, checkpoint_1, checkpoint_2
from family_checkpoints import FAMILIES, write_checkpoint

from collie_core import AutoModelForCausalLM
from collie_core.cli.main import main
from collie_core.errors import CheckpointError, ConfigError, UserError
from collie_models.chatglm import ChatGLMForCausalLM
from collie_models.chatglm.provider import ChatGLM2Provider
from collie_models.chatglm.provider_v1 import ChatGLMProvider
from collie_models.decoder.config import DecoderConfig
from collie_models.decoder.rotary import Rotary
from collie_models.internlm.provider import InternLM2Provider, InternLMProvider
from collie_models.moss.provider import MossProvider

INTERNLM, INTERNLM2, MOSS = (dict(FAMILIES[name].config) for name in ("internlm", "internlm2", "moss"))
REFUSED = [
    (INTERNLM, {"use_magic": 1}, "unknown key 'use_magic'"),
    (INTERNLM, {"rms_norm_epss": 1e-5}, "unknown key 'rms_norm_epss', did you mean 'rms_norm_eps'"),
    (INTERNLM, {"hidden_act": "mish"}, "hidden_act: 'mish' is not supported"),
    (INTERNLM, {"num_key_value_heads": 2}, "num_key_value_heads: 2 is not supported"),
    (INTERNLM, {"bias": "yes"}, "bias: 'yes' is not true or false"),
    (INTERNLM, {"rotary": {"base": 10000, "type": "spiral"}}, "rotary.type: 'spiral' is not supported"),
    (INTERNLM, {"rotary": {"base": 10000}, "rope_theta": 1e4}, "rotary and rope_theta are both given"),
    (INTERNLM, {"rotary": 3}, "rotary: 3 is not a mapping"),
    (INTERNLM, {"quantization_config": {"bits": 4}}, "quantization_config"),
    (INTERNLM, {"num_attention_heads": 3}, "hidden_size 32 is no multiple of num_attention_heads 3"),
    (INTERNLM2, {"rope_scaling": {"type": "yarn", "factor": 2.0, "beta": 3}}, "unknown key 'beta'"),
    (INTERNLM2, {"rope_scaling": {"type": "dynamic"}}, "factor is missing"),
    (INTERNLM2, {"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
    (INTERNLM2, {"sliding_window": 128}, "sliding_window: 128 is not supported"),
    (MOSS, {"n_head": 2}, "n_head 2 is no multiple of 4"),
    (MOSS, {"n_head": 12}, "n_embd 64 is no multiple of n_head 12"),
    (MOSS, {"rotary_dim": 7}, "rotary_dim: 7"),
    (MOSS, {"rotary_dim": 18}, "rotary_dim: 18"),
    (MOSS, {"attn_pdrop": 0.1}, "attn_pdrop: 0.1 is not supported"),
    (MOSS, {"scale_attn_weights": False}, "scale_attn_weights: False is not supported"),
    (MOSS, {"activation_function": "tanh"}, "activation_function: 'tanh' is not supported"),
    (MOSS, {"wbits": 4}, "wbits: 4 is not supported"),
    (MOSS, {"n_heads": 4}, "unknown key 'n_heads', did you mean 'n_head'"),
    (CONFIG_1, {"position_encoding_2d": False}, "position_encoding_2d: False is not supported"),
    (CONFIG_1, {"pre_seq_len": 128}, "pre_seq_len: 128 is not supported"),
    (CONFIG_1, {"prefix_projection": True}, "prefix_projection: True is not supported"),
    (CONFIG_1, {"quantization_bit": 4}, "quantization_bit: 4 is not supported"),
    (CONFIG_1, {"quantization_bit": 8}, "ChatGLM-6B: quantization_bit: 8 is not supported"),
    (CONFIG_1, {"num_attention_heads": 5}, "hidden_size 32 is no multiple"),
    (CONFIG_1, {"hidden_act": "gelu"}, "ChatGLM-6B: unknown key 'hidden_act'"),
    (CONFIG_1, {"padded_vocab_size": 96}, "shared by two architectures, ChatGLM-6B .* this config has"),
    (CONFIG_2, {"position_encoding_2d": True}, "shared by two architectures, ChatGLM-6B .* this config has"),
    (CONFIG_2, {"pre_seq_len": 128}, "ChatGLM2: pre_seq_len: 128 is not supported"),
    (CONFIG_2, {"quantization_bit": 4}, "ChatGLM2: quantization_bit: 4 is not supported"),
    (CONFIG_2, {"hidden_dropout": 0.1}, "hidden_dropout: 0.1 is not supported"),
    (CONFIG_2, {"fp32_residual_connection": True}, "fp32_residual_connection: True is not supported"),
    (
        CONFIG_2,
        {"multi_query_group_num": 3},
        "num_attention_heads 4 is no multiple of multi_query_group_num 3",
    ),
    (CONFIG_2, {"kv_channels": 6}, "kv_channels 6 is no multiple of 4"),
    (CONFIG_2, {"vocab_size": 97}, "vocab_size: 97 is not that of padded_vocab_size"),
    (CONFIG_2, {"rmsnorm": 1}, "rmsnorm: 1 is not true or false"),
    (CONFIG_2, {"rope_theta": 1e6}, "ChatGLM2: unknown key 'rope_theta'"),
    ({"model_type": "chatglm"}, {}, "shared by two architectures, .* this config has none of these"),
]


@pytest.mark.parametrize(("config", "changes", "message"), REFUSED)
def test_refused_by_name(config: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AutoModelForCausalLM.from_config(config | changes)


def test_one_line_and_status_2_on_the_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    checkpoint_1(tmp_path / "int4", quantization_bit=4)
    assert main(["export", str(tmp_path / "int4"), str(tmp_path / "out")]) == 2
    error = capfd.readouterr().err
    assert "config.json" in error and "quantization_bit: 4 is not supported" in error
    assert "Traceback" not in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=["int8", "float8"])
@pytest.mark.parametrize("make", [checkpoint_1, checkpoint_2])
def test_quantised_tensors_are_refused(make: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    """Without any word of it in the config."""
    config, tensors = make(tmp_path)
    for name in [name for name in tensors if name.endswith("query_key_value.weight")]:
        tensors[name] = tensors[name].to(dtype)
        tensors[f"{name}_scale"] = torch.ones(len(tensors[name]))
    write_checkpoint(tmp_path, config, tensors)
    kind = str(dtype).removeprefix("torch.")
    message = rf"the weights are quantised, .*layers\.0\.\S*query_key_value\.weight \({kind}\)"
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


#: an original's own defaults, of a config that says little more than what the model is
DEFAULTS = [
    (InternLMProvider(), {}, {"vocab_size": 103168, "num_layers": 32, "qkv_bias": True, "eos_token_id": 2}),
    (InternLM2Provider(), {"bias": False}, {"hidden_size": 4096, "qkv_bias": False, "num_kv_heads": 32}),
    (MossProvider(), {}, {"vocab_size": 107008, "hidden_size": 4096, "num_layers": 28, "num_heads": 16}),
    (MossProvider(), {}, {"intermediate_size": 16384, "max_positions": 2048, "eos_token_id": 106068}),
    (ChatGLMProvider(), {}, {"vocab_size": 150528, "sop_token_id": 150004, "tie_embeddings": True}),
    (ChatGLM2Provider(), {}, {"vocab_size": 65024, "num_kv_heads": 32, "qkv_bias": False, "head_dim": 128}),
    (ChatGLM2Provider(), {"multi_query_attention": True}, {"num_kv_heads": 1, "max_positions": 2048}),
]


@pytest.mark.parametrize(("provider", "config", "expected"), DEFAULTS)
def test_defaults_of_the_original(provider: Any, config: dict[str, Any], expected: dict[str, Any]) -> None:
    found = dataclasses.asdict(provider.read_config(config))
    assert {key: found[key] for key in expected} == expected


def test_released_configs() -> None:
    """The keys of released checkpoints, with transformers' own beside them."""
    moss = MossProvider().read_config(
        MOSS
        | {"n_embd": 6144, "n_head": 24, "n_layer": 34, "rotary_dim": 64, "vocab_size": 107008}
        | {"summary_type": "cls_index", "task_specific_params": {"text-generation": {}}, "use_cache": True}
    )
    assert moss.rotary == Rotary(64, interleaved=True) and moss.head_dim == 256
    chatglm3 = ChatGLM2Provider().read_config(
        CONFIG_2 | {"rope_ratio": 50, "classifier_dropout": None, "pre_seq_len": None, "quantization_bit": 0}
    )
    assert chatglm3.rotary == Rotary(4, 500000.0, interleaved=True)
    internlm2 = InternLM2Provider().read_config(
        INTERNLM2 | {"rope_scaling": {"type": "dynamic", "factor": 3.0}, "attn_implementation": "eager"}
    )
    assert isinstance(internlm2, DecoderConfig)


def test_there_are_no_positions_beyond_the_last(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint_2(tmp_path, seq_length=16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="17 tokens in a row, and the model has 16 positions"):
        model(torch.arange(17).unsqueeze(0))
    found = model.generate(torch.arange(10).unsqueeze(0), max_new_tokens=20, eos_token_id=-1)
    assert found.shape == (1, 16) and "6 new tokens instead of 20" in caplog.text


def test_code_in_the_folder_is_never_run(tmp_path: Path) -> None:
    checkpoint_1(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    AutoModelForCausalLM.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "saved" / "evil.py").exists()


@pytest.mark.parametrize("make", [checkpoint_1, checkpoint_2])
def test_another_vocabulary_size(make: Any, tmp_path: Path) -> None:
    make(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    ids = torch.tensor([[10, 91, 94, 20]])
    before = model(ids).logits
    model.resize_token_embeddings(104)
    torch.testing.assert_close(model(ids).logits[..., :96], before)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(ids).logits, model(ids).logits) and again(ids).logits.shape[-1] == 104


def test_a_vocabulary_size_that_was_not_stated_is_afterwards(tmp_path: Path) -> None:
    config = {key: value for key, value in CONFIG_2.items() if key != "padded_vocab_size"}
    model = AutoModelForCausalLM.from_config(
        {**config, "hidden_size": 8, "ffn_hidden_size": 8, "num_layers": 1}
    )
    model.resize_token_embeddings(100)
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path)(torch.arange(9)[None]).logits.shape == (1, 9, 100)


CLASSES = {
    "llama": ("Llama", "LlamaForCausalLM"),
    "qwen": ("Qwen2", "Qwen3", "Qwen2ForCausalLM", "Qwen3ForCausalLM"),
    "mistral": ("Mistral", "MistralForCausalLM"),
    "internlm": ("InternLM", "InternLMForCausalLM", "InternLM2", "InternLM2ForCausalLM"),
    "moss": ("Moss", "MossForCausalLM"),
    "chatglm": ("ChatGLM", "ChatGLMForCausalLM", "ChatGLM2ForCausalLM"),
}


def test_plugins_are_light_to_import_and_models_are_there() -> None:
    lines = [f"from collie_models.{family} import {names[0]}" for family, names in CLASSES.items()]
    lines += ["import sys", "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"]
    lines += [f"from collie_models.{family} import {', '.join(names)}" for family, names in CLASSES.items()]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)


def test_a_class_takes_its_own_family_alone(tmp_path: Path) -> None:
    checkpoint_1(tmp_path / "one")
    checkpoint_2(tmp_path / "two")
    assert type(ChatGLMForCausalLM.from_pretrained(tmp_path / "one")) is ChatGLMForCausalLM
    with pytest.raises(ConfigError, match="describes a ChatGLM2ForCausalLM, not a ChatGLMForCausalLM"):
        ChatGLMForCausalLM.from_pretrained(tmp_path / "two")
