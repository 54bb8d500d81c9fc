"""A model plugin of a stranger: a plain nn.Module with embed, blocks and head, and rules for its weights."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from collie_core import AutoModelForCausalLM
from collie_core.errors import ConfigError, PluginError
from collie_core.models.causal_lm import CausalLM
from collie_core.models.export import export_pretrained
from collie_models.llama import LlamaForCausalLM

PLUGIN = """
from dataclasses import dataclass

import torch
from torch import nn

from collie_core.plugin import ConfigError, Ignore, ParallelPlan, Relative, Rename, Split, hookimpl


class Embed(nn.Module):
    def __init__(self, vocab, width):
        super().__init__()
        self.words = nn.Embedding(vocab, width)

    def forward(self, input_ids, ctx):
        return self.words(input_ids)


class Block(nn.Module):
    def __init__(self, width, ops):
        super().__init__()
        self.ops = ops
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.register_buffer("slope", torch.zeros(1), persistent=False)

    def forward(self, h, ctx):
        q, k, v = (p(h).unflatten(-1, (2, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        q = q * (1 + self.slope * ctx.positions[:, None, :, None])
        return h + self.ops.attention(q, k, v, ctx).transpose(1, 2).flatten(2)


class Head(nn.Module):
    def __init__(self, vocab, width):
        super().__init__()
        self.out = nn.Linear(width, vocab)

    def forward(self, h, ctx):
        return self.out(h)


class Model(nn.Module):
    def __init__(self, config, ops):
        super().__init__()
        self.embed = Embed(config["vocab_size"], config["width"])
        self.blocks = nn.ModuleDict({str(n): Block(config["width"], ops) for n in range(config["depth"])})
        self.head = Head(config["vocab_size"], config["width"])

    RESET


class Provider:
    template = None
    export_as = {
        "twin": Relative(
            config=lambda hf: {**hf, "model_type": "twin"},
            weight_map=lambda config: [
                Rename(rule.sources[0].upper(), rule.targets[0]) if isinstance(rule, Rename) else rule
                for rule in Provider().weight_map(config)
            ],
        )
    }

    def read_config(self, hf_config):
        if hf_config.get("width", 0) % 2:
            raise ConfigError("width must be even")
        return dict(hf_config)

    def build(self, config, ops):
        return Model(config, ops)

    def weight_map(self, config):
        width = config["width"]
        for n in range(config["depth"]):
            targets = tuple(f"blocks.{n}.{x}.weight" for x in "qkv")
            yield Split(f"layers.{n}.qkv", targets, (width // 2,) * 3, groups=2)
        yield Rename("words", "embed.words.weight")
        yield Rename("out.weight", "head.out.weight")
        yield Rename("out.bias", "head.out.bias")
        yield Ignore("*.masked_bias")
        EXTRA

    def parallel_plan(self, config):
        return ParallelPlan(embedding=("embed.words.weight",), head=("head.out.*",))

    def tokenizer(self, path):
        return None


class Plugin:
    collie_api = 1

    @hookimpl
    def collie_model_provider(self, checkpoint):
        assert checkpoint.config["model_type"] == "stranger"
        return Provider()
"""

RESET = """def reset_buffers(self, device):
        for block in self.blocks.values():
            block.slope = torch.full((1,), 0.25, device=device)
"""

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts the plugin where Python finds it, as an installed distribution."""

    def put(reset: str = RESET, extra: str = "") -> None:
        site = tmp_path / "site"
        info = site / "stranger-1.0.dist-info"
        info.mkdir(parents=True)
        (site / "stranger_model.py").write_text(PLUGIN.replace("RESET", reset).replace("EXTRA", extra))
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[collie.models]\nstranger = stranger_model:Plugin\n")
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.delitem(sys.modules, "stranger_model", raising=False)
        importlib.invalidate_caches()

    return put


CONFIG = {"model_type": "stranger", "vocab_size": 40, "width": 12, "depth": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    target = tmp_path / "model"
    target.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {f"layers.{n}.qkv": torch.randn(36, 12, generator=generator) for n in range(2)}
    tensors |= {"words": torch.randn(40, 12), "out.weight": torch.randn(40, 12), "out.bias": torch.randn(40)}
    tensors["layers.0.masked_bias"] = torch.zeros(1)
    save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps(CONFIG))
    return target


def ids() -> Tensor:
    return torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(1))


def test_it_gets_everything_that_ours_has(install: Install, folder: Path, tmp_path: Path) -> None:
    install()
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model, CausalLM)
    names = [name for name, _ in model.named_parameters()]
    assert names[0] == "embed.words.weight" and "blocks.1.v.weight" in names
    stored = load_file(folder / "model.safetensors")
    fused = stored["layers.1.qkv"].view(2, 3, 6, 12)
    assert torch.equal(model.get_parameter("blocks.1.k.weight"), fused[:, 1].flatten(0, 1))
    assert float(model.get_buffer("blocks.0.slope")) == 0.25

    out = model(ids(), labels=ids())
    assert out.logits.shape == (2, 7, 40) and out.loss is not None
    out.loss.backward()
    row = model.generate(ids()[:1], max_new_tokens=5)
    again = model(row).logits[0, 6:-1].argmax(-1)
    assert torch.equal(row[0, 7:], again)

    model.save_pretrained(tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == stored.keys() - {"layers.0.masked_bias"}
    assert all(torch.equal(saved[name], stored[name]) for name in saved)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == CONFIG | {"torch_dtype": "float32"}

    model.resize_token_embeddings(45)
    assert model(ids()).logits.shape == (2, 7, 45)
    model.to(torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_random_weights_and_relatives(install: Install, tmp_path: Path) -> None:
    install()
    model = AutoModelForCausalLM.from_config(CONFIG, seed=3)
    assert float(model.get_buffer("blocks.0.slope")) == 0.25
    assert float(model.get_parameter("head.out.bias").detach().abs().max()) == 0.0
    origin = model.origin
    assert origin is not None
    named = [(name, p.detach()) for name, p in model.named_parameters()]

    def export(relative: str) -> None:
        export_pretrained(
            tmp_path / relative, origin.provider, origin.config, origin.hf_config, named, relative=relative
        )

    export("twin")
    assert "OUT.BIAS" in load_file(tmp_path / "twin" / "model.safetensors")
    assert json.loads((tmp_path / "twin" / "config.json").read_text())["model_type"] == "twin"
    with pytest.raises(ConfigError, match="cannot export as 'twim', did you mean 'twin'"):
        export("twim")


def test_a_buffer_without_a_value_is_refused(install: Install, folder: Path) -> None:
    install(reset="")
    with pytest.raises(
        PluginError, match=r"no value for the buffers blocks.0.slope, blocks.1.slope.*reset_buffers"
    ):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ('yield Rename("x", "head.nothing")', "names head.nothing, which the module does not have"),
        ('yield Rename("words", "embed.words")', "names embed.words, which the module does not have"),
    ],
)
def test_a_weight_map_that_does_not_fit_is_told(
    install: Install, folder: Path, extra: str, message: str
) -> None:
    install(extra=extra)
    with pytest.raises(PluginError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_its_refusals_name_the_file(install: Install, folder: Path) -> None:
    install()
    (folder / "config.json").write_text(json.dumps(CONFIG | {"width": 13}))
    with pytest.raises(ConfigError, match=f"{folder / 'config.json'}: width must be even"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_class_takes_its_own_family_alone(install: Install, folder: Path) -> None:
    install()
    with pytest.raises(ConfigError, match="describes a Model, not a LlamaForCausalLM"):
        LlamaForCausalLM.from_pretrained(folder)
