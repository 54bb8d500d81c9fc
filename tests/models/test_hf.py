"""Models of transformers against the stock classes: logits, padding, packing, saving, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from collie_core import AutoModelForCausalLM as Ours
from collie_core.errors import CheckpointError, ConfigError, PluginError, UserError
from collie_core.models.causal_lm import CausalLM, run_blocks
from collie_core.models.provider import provider_for
from collie_core.ops import Context

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2}
WINDOW: dict[str, Any] = {"sliding_window": 5}
CONFIGS: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(
        vocab_size=96,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=64,
        attn_pdrop=0,
        resid_pdrop=0,
        embd_pdrop=0,
    ),
    "qwen2": Qwen2Config(**GROUPED, **WINDOW, use_sliding_window=True, max_window_layers=1),
    "qwen3": Qwen3Config(**GROUPED, head_dim=8),
    "mistral": MistralConfig(**GROUPED, **WINDOW),
    "gemma": GemmaConfig(**GROUPED, head_dim=8),
    "gemma2": Gemma2Config(
        **GROUPED, **WINDOW, head_dim=8, final_logit_softcapping=2.0, attn_logit_softcapping=1.5
    ),
    "gemma3": Gemma3TextConfig(
        **GROUPED,
        **WINDOW,
        head_dim=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi": PhiConfig(**GROUPED, attention_dropout=0.0),
    "phi3": Phi3Config(**GROUPED, pad_token_id=0),
    "gpt_neox": GPTNeoXConfig(**SIZES),
    "cohere": CohereConfig(**GROUPED),
}


def save_stock(folder: Path, config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    # eager: the library's fused attention leaves Gemma 2's soft cap out in some versions
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    loaded: PreTrainedModel = model
    return loaded


def ids() -> Tensor:
    return torch.randint(1, 96, (2, 12), generator=torch.Generator().manual_seed(1))


def masks() -> dict[str, Tensor]:
    left = torch.ones(2, 12, dtype=torch.long)
    left[0, :3] = 0
    return {"none": torch.ones_like(left), "left": left, "right": left.flip(1)}


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_equals_transformers(family: str, tmp_path: Path) -> None:
    stock = save_stock(tmp_path, CONFIGS[family])
    model = Ours.from_pretrained(tmp_path, provider="hf")
    positions = torch.arange(12).expand(2, -1)
    for name, mask in masks().items():
        expected = stock(ids(), attention_mask=mask, position_ids=positions).logits[mask.bool()]
        found = model(ids(), attention_mask=mask).logits[mask.bool()]
        assert float(expected.detach().std()) > 0.01
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5, msg=lambda m: f"{name}: {m}")  # noqa: B023
    kept = {
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    mask = masks()["left"]
    expected = stock.generate(input_ids=ids(), attention_mask=mask, **kept)  # type: ignore[operator]
    assert torch.equal(model.generate(ids(), mask, max_new_tokens=6, eos_token_id=-1), expected)


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_gradients_packing_and_saving(family: str, tmp_path: Path) -> None:
    stock = save_stock(tmp_path, CONFIGS[family])
    model = Ours.from_pretrained(tmp_path, provider="hf")
    assert model.origin is not None
    model(ids(), labels=ids()).loss.backward()
    stock(ids(), labels=ids()).loss.backward()
    expected = {name: p.grad for name, p in stock.named_parameters() if p.grad is not None}
    names = {
        rule.targets[0]: rule.sources[0]
        for rule in model.origin.provider.weight_map(model.origin.config)
        if rule.targets
    }
    written = load_file(tmp_path / "model.safetensors")
    for name, parameter in model.named_parameters():
        stored = names[name] if names[name] in expected else names[name].replace("embed_out", "lm_head")
        torch.testing.assert_close(parameter.grad, expected[stored], atol=1e-5, rtol=1e-3)
    assert len(expected) == len(list(model.named_parameters()))
    packed_equals_single(model)
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == written.keys()
    assert all(torch.equal(saved[name], written[name]) for name in saved)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager").eval()
    torch.testing.assert_close(again(ids()).logits, stock(ids()).logits, atol=1e-5, rtol=1e-5)


def packed_equals_single(model: CausalLM) -> None:
    """Records of 5 and 7 tokens in one row give what each gives alone."""
    row = ids()[:1]
    segments = torch.tensor([[1] * 5 + [2] * 7])
    ctx = Context.build(row, segments=segments)
    packed = model.head(run_blocks(model, row, ctx), ctx)
    single = torch.cat([model(row[:, :5]).logits, model(row[:, 5:]).logits], 1)
    torch.testing.assert_close(packed, single, atol=1e-5, rtol=1e-5)


def test_names_without_the_prefix_of_the_base_model(tmp_path: Path) -> None:
    """GPT-2's own checkpoints have `wte.weight` and masks among the weights."""
    stock = save_stock(tmp_path, CONFIGS["gpt2"])
    file = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    save_file({**tensors, "h.0.attn.bias": torch.ones(1, 1, 64, 64)}, file)
    model = Ours.from_pretrained(tmp_path)
    torch.testing.assert_close(model(ids()).logits, stock(ids()).logits, atol=1e-5, rtol=1e-5)
    assert model.get_parameter("head.stock.lm_head.weight") is model.get_parameter("embed.stock.wte.weight")
    model.save_pretrained(tmp_path / "saved")
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == tensors.keys()


def test_gpt2_with_a_padding_token(tmp_path: Path) -> None:
    """With one the library's model looks for it in the ids, which have no values while it is taken apart."""
    stock = save_stock(tmp_path, GPT2Config(**CONFIGS["gpt2"].to_dict() | {"pad_token_id": 0}))
    model = Ours.from_pretrained(tmp_path)
    padded = ids().masked_fill(masks()["right"] == 0, 0)
    found, expected = (run(padded, attention_mask=masks()["right"]).logits for run in (model, stock))
    seen = masks()["right"].bool()
    torch.testing.assert_close(found[seen], expected[seen], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding_that_scales_is_not_resized(tied: bool) -> None:
    """Nor is the head alone, which would then not fit it."""
    config = CONFIGS["gemma"].to_dict() | {"tie_word_embeddings": tied}
    model = Ours.from_config(config, provider="hf")
    with pytest.raises(UserError, match="names no embedding in its parallel plan; it cannot be resized"):
        model.resize_token_embeddings(101)
    assert model(ids()).logits.shape[-1] == 96


def test_a_bin_file_is_read(tmp_path: Path) -> None:
    stock = save_stock(tmp_path, CONFIGS["phi"])
    (tmp_path / "model.safetensors").unlink()
    torch.save(stock.state_dict(), tmp_path / "pytorch_model.bin")
    model = Ours.from_pretrained(tmp_path)
    torch.testing.assert_close(model(ids()).logits, stock(ids()).logits, atol=1e-5, rtol=1e-5)


def test_dropout_is_drawn_in_training_alone(tmp_path: Path) -> None:
    save_stock(
        tmp_path, GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.5, resid_pdrop=0)
    )
    model = Ours.from_pretrained(tmp_path)
    assert torch.equal(model(ids()).logits, model(ids()).logits)
    model.train()
    assert not torch.equal(model(ids()).logits, model(ids()).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_blocks_keep_the_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    save_stock(tmp_path, CONFIGS["gemma3"])
    model = Ours.from_pretrained(tmp_path, provider="hf", dtype=dtype)
    ctx = Context.build(ids())
    h = model.embed(ids(), ctx)
    for block in model.blocks.values():
        assert h.dtype == dtype
        h = block(h, ctx)
    assert h.dtype == dtype and model.head(h, ctx).dtype == dtype


def test_blocks_of_a_kind_compile_to_one_graph(tmp_path: Path) -> None:
    save_stock(tmp_path, CONFIGS["qwen3"])
    model = Ours.from_pretrained(tmp_path, provider="hf")
    plain = model(ids()).logits
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(len(inputs))
        return graph.forward

    torch._dynamo.reset()
    for block in model.blocks.values():
        block.compile(backend=backend, fullgraph=True)
    torch.testing.assert_close(model(ids()).logits, plain)
    assert len(graphs) == 1


def test_a_stage_without_the_embedding_runs_alone(tmp_path: Path) -> None:
    """A later pipeline stage makes rotary angles and the like itself."""
    save_stock(tmp_path, CONFIGS["gemma3"])
    model = Ours.from_pretrained(tmp_path, provider="hf")
    h = model.embed(ids(), Context.build(ids()))
    ctx = Context.build(ids())
    for block in model.blocks.values():
        h = block(h, ctx)
    torch.testing.assert_close(model.head(h, ctx), model(ids()).logits)


PLANS = {
    "qwen3": (
        {"columns": 5, "rows": 2, "partial": 2, "keys_values": 2, "embedding": 1, "head": 1, "tied": 0},
        "blocks.*.layer.self_attn.q_proj.*",
    ),
    "gemma": (
        {"columns": 5, "rows": 2, "partial": 0, "keys_values": 2, "embedding": 0, "head": 0, "tied": 1},
        "blocks.*.layer.mlp.gate_proj.*",
    ),
    "gpt2": (
        {"columns": 0, "rows": 0, "partial": 0, "keys_values": 0, "embedding": 1, "head": 1, "tied": 1},
        "",
    ),
    "phi3": ({"columns": 0, "rows": 0, "embedding": 1, "head": 1, "tied": 0}, ""),
}


@pytest.mark.parametrize("family", sorted(PLANS))
def test_the_plan_of_transformers_is_translated(family: str) -> None:
    from fnmatch import fnmatchcase

    model = Ours.from_config(CONFIGS[family].to_dict(), provider="hf")
    assert model.origin is not None
    plan = model.origin.provider.parallel_plan(model.origin.config)
    counts, sample = PLANS[family]
    assert {name: len(getattr(plan, name)) for name in counts} == counts
    assert not sample or sample in plan.columns
    names = dict(model.named_parameters(remove_duplicate=False))
    for patterns in (plan.columns, plan.rows, plan.partial, plan.embedding, plan.head):
        for pattern in patterns:
            assert any(fnmatchcase(name, pattern) for name in names), pattern
    for one, other in plan.tied:
        assert names[one] is names[other]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "gpt3"}, "model_type 'gpt3' is not implemented by transformers, did you mean"),
    (
        {"model_type": "internlm", "auto_map": {"AutoConfig": "x.Y"}},
        "model_type 'internlm' is not implemented",
    ),
    ({"model_type": "t5"}, "model_type 't5' is no causal language model"),
    ({"model_type": "mixtral", **GROUPED}, "mixtures of experts are not supported"),
    ({"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 96}, "'mamba' is not"),
    ({"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4}, "'bloom' is not supported: its"),
    ({"model_type": "falcon", "hidden_size": 32, "num_attention_heads": 4, "alibi": True}, "alibi: True"),
    ({"model_type": "llama", **SIZES, "quantization_config": {"bits": 4}}, "quantization_config"),
    (
        {"model_type": "llama", **SIZES, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        "rope_type 'dynamic' is not supported",
    ),
    ({"model_type": "gpt2", "n_embd": 30, "n_head": 4, "n_layer": 1}, "transformers cannot make this model"),
]


@pytest.mark.parametrize(("content", "message"), REFUSED, ids=[c["model_type"] for c, _ in REFUSED])
def test_what_cannot_be_right_is_refused_by_name(
    content: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        Ours.from_pretrained(tmp_path, provider="hf")


def test_a_family_with_a_plugin_of_its_own_is_told_of_it() -> None:
    with pytest.raises(
        ConfigError, match=r"'internlm' is not implemented.*a plugin of its own serves internlm"
    ):
        Ours.from_config({"model_type": "internlm"}, provider="*")


def test_a_misspelt_provider_is_not_served_by_the_wildcard() -> None:
    with pytest.raises(PluginError, match="unknown model 'lama', did you mean 'llama'"):
        Ours.from_config({"model_type": "llama", **SIZES}, provider="lama")


def test_own_plugins_go_first() -> None:
    assert provider_for({"model_type": "llama", **SIZES}, None).name == "llama"
    assert provider_for(CONFIGS["gpt2"].to_dict(), None).name == "*"


def test_code_of_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    save_stock(tmp_path, CONFIGS["gpt2"])
    trap = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(trap)!r}, 'w')\nclass Config: ...\nclass Model: ...\n")
    config = json.loads((tmp_path / "config.json").read_text())
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": "evil.T"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
    model = Ours.from_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["evil.T", None]}})
    )
    assert model.origin is not None
    with pytest.raises(CheckpointError, match="no tokenizer that transformers can read"):
        model.origin.provider.tokenizer(tmp_path)
    assert not trap.exists()
