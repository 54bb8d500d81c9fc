"""LLaMA against transformers on random tiny models; its config; its blocks under torch.compile."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CodeGenConfig, CodeGenForCausalLM, LlamaConfig
from transformers import LlamaForCausalLM as StockLlama

from collie_core import AutoModelForCausalLM, CollieConfig
from collie_core.errors import ConfigError, UserError
from collie_core.models.causal_lm import run_blocks
from collie_core.ops import Context, select_ops
from collie_models.decoder.config import DecoderConfig
from collie_models.decoder.model import Decoder
from collie_models.decoder.rotary import Rotary
from collie_models.llama import LlamaForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"num_key_value_heads": 2},
    "multi_query": {"num_key_value_heads": 1},
    "head_dim": {"head_dim": 12, "num_key_value_heads": 2},
    "five_heads": {"hidden_size": 100, "num_attention_heads": 5},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "gelu": {"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-3},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
}


def save_stock(folder: Path, **changes: Any) -> StockLlama:
    """A transformers LLaMA with random weights (biases and norms too), saved in `folder`."""
    torch.manual_seed(0)
    model = StockLlama(LlamaConfig(**(SIZES | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model.eval()


def ids(rows: int = 2, length: int = 12) -> Tensor:
    return torch.randint(0, 96, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_equals_transformers(variant: str, tmp_path: Path) -> None:
    stock = save_stock(tmp_path, **VARIANTS[variant])
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    batch = ids(2, 80 if variant == "dynamic" else 12)
    mask = torch.ones_like(batch)
    mask[0, :3] = 0
    labels = batch.masked_fill(mask == 0, -100)
    labels[0, 3] = -100  # predicted from a padding position, which has no meaning
    expected, found = (m(batch, attention_mask=mask, labels=labels) for m in (stock, model))
    torch.testing.assert_close(found.logits[mask.bool()], expected.logits[mask.bool()], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-5, rtol=1e-5)
    expected.loss.backward()
    found.loss.backward()
    stock_gradients = {name: p.grad for name, p in stock.named_parameters()}
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert len(gradients) == len(stock_gradients)
    assert model.origin is not None
    for rule in model.origin.provider.weight_map(model.origin.config):
        if rule.targets and rule.targets[0] in gradients:
            for name, gradient in rule.save(gradients).items():  # type: ignore[arg-type]
                torch.testing.assert_close(gradient, stock_gradients[name], atol=1e-5, rtol=1e-3)


def test_parts_compose_another_family(tmp_path: Path) -> None:
    """Parallel residual, LayerNorm, plain MLP, partial interleaved rotary, head bias: as CodeGen has."""
    torch.manual_seed(0)
    stock = CodeGenForCausalLM(
        CodeGenConfig(vocab_size=96, n_embd=32, n_head=4, n_layer=2, n_positions=64, rotary_dim=4, n_inner=48)
    ).eval()
    config = DecoderConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        head_dim=8,
        rotary=Rotary(4, interleaved=True),
        norm="layer",
        norm_eps=1e-5,
        activation="gelu_tanh",
        gated_mlp=False,
        mlp_bias=True,
        head_bias=True,
        residual="parallel",
    )
    model = Decoder(config, select_ops())
    state = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in stock.state_dict().items()}
    stock.load_state_dict(state)
    values = {
        "embed.tokens.weight": state["transformer.wte.weight"],
        "head.norm.weight": state["transformer.ln_f.weight"],
        "head.norm.bias": state["transformer.ln_f.bias"],
        "head.lm_head.weight": state["lm_head.weight"],
        "head.lm_head.bias": state["lm_head.bias"],
    }
    for layer in range(2):
        source, target = f"transformer.h.{layer}", f"blocks.{layer}"
        qvk = state[f"{source}.attn.qkv_proj.weight"].view(4, 3, 8, 32)
        for index, name in ((0, "q"), (2, "k"), (1, "v")):
            values[f"{target}.attention.{name}_proj.weight"] = qvk[:, index].flatten(0, 1)
        values[f"{target}.attention.o_proj.weight"] = state[f"{source}.attn.out_proj.weight"]
        for name in ("weight", "bias"):
            values[f"{target}.norm.{name}"] = state[f"{source}.ln_1.{name}"]
            values[f"{target}.mlp.up_proj.{name}"] = state[f"{source}.mlp.fc_in.{name}"]
            values[f"{target}.mlp.down_proj.{name}"] = state[f"{source}.mlp.fc_out.{name}"]
    model.load_state_dict(values)
    torch.testing.assert_close(model(ids()).logits, stock(ids()).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_block_keeps_the_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    stock = save_stock(tmp_path, num_key_value_heads=2)
    model = LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    seen: list[torch.dtype] = []
    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(
                lambda _, inputs, output: seen.extend([inputs[0].dtype, output.dtype])
            )
    for block in model.blocks.values():
        block.register_forward_hook(lambda _, inputs, output: seen.extend([inputs[0].dtype, output.dtype]))
    logits = model(ids()).logits
    assert set(seen) == {dtype, torch.int64} and logits.dtype == dtype
    assert float((logits.float() - stock(ids()).logits).detach().abs().max()) < 0.2


def test_all_blocks_compile_to_one_graph(tmp_path: Path) -> None:
    save_stock(tmp_path, num_hidden_layers=4, num_key_value_heads=2)
    model = LlamaForCausalLM.from_pretrained(tmp_path)
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
    for length in range(5, 12):  # a second graph serves every other length
        model(ids(2, length), labels=ids(2, length)).loss.backward()
    assert len(graphs) == 2
    row = model.generate(ids()[:1], max_new_tokens=5, eos_token_id=-1)
    assert row.shape == (1, 17) and len(graphs) == 2  # generation compiles nothing
    segments = torch.ones_like(ids())
    segments[:, 6:] = 2
    for _ in range(2):
        ctx = Context.build(ids(), segments=segments)
        run_blocks(model, ids(), ctx).sum().backward()
    assert len(graphs) <= 4  # packed: the first block makes the mask, the others read it


def test_plugin_and_class_are_light_to_import() -> None:
    code = (
        "import sys, collie_models.llama as m; assert m.Llama.collie_api == 1; "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def read(**changes: Any) -> DecoderConfig:
    from collie_models.llama.provider import LlamaProvider

    return LlamaProvider().read_config({"model_type": "llama", **SIZES, **changes})


def test_config_defaults_are_those_of_transformers() -> None:
    config, stock = read(), LlamaConfig(**SIZES)
    assert (config.head_dim, config.num_kv_heads) == (stock.head_dim, stock.num_key_value_heads)
    assert config.norm_eps == stock.rms_norm_eps and config.initializer_range == stock.initializer_range
    assert not (config.tie_embeddings or config.qkv_bias or config.mlp_bias)
    # what does not change the result is accepted
    assert (
        read(pretraining_tp=2, use_cache=False, auto_map={"AutoModel": "x.py"}, attention_dropout=0.0)
        == config
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "silo"}, "hidden_act: 'silo' is not supported, did you mean 'silu'"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ({"hidden_size": 30}, "hidden_size 30 is no multiple of num_attention_heads 4"),
        ({"head_dim": 5}, "head_dim 5 is odd"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers: '2' is not a positive whole number"),
        ({"attention_bias": "yes"}, "attention_bias: 'yes' is not true or false"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: .* is not supported"),
        ({"attention_dropout": 0.1}, "attention_dropout: 0.1 is not supported"),
    ],
)
def test_bad_configs_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(**changes)


def test_old_special_ids_are_corrected_with_a_warning(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with caplog.at_level(logging.WARNING):
        config = read(bos_token_id=0, eos_token_id=1, pad_token_id=-1)
    assert "eos_token_id" in caplog.text and "pad_token_id" in caplog.text
    assert config.eos_token_id == 2


def test_sizes_above_one_leave_the_model_on_meta(tiny_llama: Path) -> None:
    config = CollieConfig.from_pretrained(tiny_llama, tp_size=2)
    model = LlamaForCausalLM.from_pretrained(tiny_llama, config=config)
    assert all(p.is_meta for p in model.parameters())
    assert model.origin is not None and model.origin.path == tiny_llama
    for call in (lambda: model(ids()), lambda: model.save_pretrained("x"), lambda: model.generate(ids())):
        with pytest.raises(UserError, match=f"weights of {tiny_llama} are not loaded.*Trainer"):
            call()


def test_config_decides_dtype_and_provider(tiny_llama: Path) -> None:
    config = CollieConfig.from_pretrained(tiny_llama)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, config=config)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with pytest.raises(ConfigError, match="use_flash: true"):
        AutoModelForCausalLM.from_pretrained(tiny_llama, use_flash=True)
