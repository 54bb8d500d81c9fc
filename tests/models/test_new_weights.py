"""Random initial weights and resized vocabularies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM as StockLlama

from collie_core import AutoModelForCausalLM
from collie_core.errors import UserError
from collie_core.models.causal_lm import CausalLM
from collie_core.models.initialise import initial_value
from collie_models.llama import LlamaForCausalLM

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "attention_bias": True,
    "initializer_range": 0.05,
}


def test_each_value_is_a_function_of_seed_and_name() -> None:
    small, deep = (
        AutoModelForCausalLM.from_config(CONFIG | {"num_hidden_layers": n}, seed=7) for n in (2, 4)
    )
    other = AutoModelForCausalLM.from_config(CONFIG, seed=8)
    state = torch.get_rng_state()
    again = LlamaForCausalLM.from_config(CONFIG, seed=7, dtype=torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), state)
    deeper = dict(deep.named_parameters())
    for name, parameter in small.named_parameters():
        assert torch.equal(parameter, deeper[name])
        assert torch.equal(parameter.bfloat16(), again.get_parameter(name))
        assert torch.equal(parameter, initial_value(name, parameter.shape, 7, 0.05))
        if parameter.ndim == 2:
            assert abs(float(parameter.detach().std()) / 0.05 - 1) < 0.1
            assert not torch.equal(parameter, other.get_parameter(name))
        else:
            assert set(parameter.tolist()) == ({0.0} if name.endswith("bias") else {1.0})
    values = [p.flatten()[0].item() for p in small.parameters() if p.ndim == 2]
    assert len(set(values)) == len(values)


def test_tied_and_untied_agree_in_all_else() -> None:
    tied, untied = (
        AutoModelForCausalLM.from_config(CONFIG | {"tie_word_embeddings": t}) for t in (True, False)
    )
    shared = dict(tied.named_parameters())
    assert "head.lm_head.weight" not in shared
    assert all(torch.equal(parameter, untied.get_parameter(name)) for name, parameter in shared.items())


def ids() -> Tensor:
    return torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [40, 61, 128])
def test_resize(size: int, tied: bool, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(CONFIG | {"tie_word_embeddings": tied})
    before = model(ids()).logits.detach()
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.resize_token_embeddings(size)
    after = model(ids()).logits
    kept = min(size, 60)
    assert after.shape[-1] == size
    torch.testing.assert_close(after[..., :kept], before[..., :kept])
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert (parameters["embed.tokens.weight"] is parameters["head.lm_head.weight"]) == tied
    for name in ("embed.tokens.weight", "head.lm_head.weight"):
        previous = old.get(name, old["embed.tokens.weight"])
        assert torch.equal(parameters[name][:kept], previous[:kept])
        for row in parameters[name][kept:]:
            torch.testing.assert_close(row, previous.mean(0))
    assert all(torch.equal(p, old[n]) for n, p in parameters.items() if "blocks" in n)

    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.origin is not None and again.origin.hf_config["vocab_size"] == size
    assert torch.equal(again(ids()).logits, after)
    stock = StockLlama.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(stock(ids()).logits, after, atol=1e-5, rtol=1e-5)


def test_resize_refusals(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with pytest.raises(UserError, match="expected at least 1"):
        model.resize_token_embeddings(0)
    with pytest.raises(UserError, match="needs a model made by from_pretrained"):
        bare = CausalLM()
        bare.add_module("weight", torch.nn.Linear(2, 2))
        bare.resize_token_embeddings(3)
