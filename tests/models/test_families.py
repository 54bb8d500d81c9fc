"""InternLM, InternLM2, MOSS and ChatGLM2 against transformers' relatives: logits, gradients, files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_checkpoints import FAMILIES, VARIANTS, VOCAB, write_checkpoint
from safetensors.torch import load_file
from torch import Tensor

from collie_core import AutoModelForCausalLM
from collie_core.cli.main import main
from collie_core.models.causal_lm import CausalLM


def batch(length: int = 12) -> tuple[Tensor, Tensor]:
    """Two rows, the first padded on the left, and their mask."""
    ids = torch.randint(3, VOCAB - 8, (2, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return ids, mask


def compare(stock: Any, model: CausalLM, length: int = 12) -> None:
    """Logits of tokens, loss and the norm of all gradients."""
    ids, mask = batch(length)
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 3] = -100  # predicted from a padding position, which has no meaning
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected, found = (
        m(ids, attention_mask=mask, position_ids=positions, labels=labels) for m in (stock, model)
    )
    kept = mask.bool()
    torch.testing.assert_close(found.logits[kept], expected.logits[kept], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-5, rtol=1e-5)
    norms = []
    for m, loss in ((stock, expected.loss), (model, found.loss)):
        loss.backward()
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in m.parameters() if p.grad is not None]))
        m.zero_grad()
    torch.testing.assert_close(norms[1], norms[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("family", "variant"), VARIANTS)
def test_equals_the_relative(family: str, variant: str, tmp_path: Path) -> None:
    stock = FAMILIES[family].write(tmp_path / "source", variant)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    long = variant in ("dynamic", "rotary")
    compare(stock, model, 80 if long else 12)
    if long:
        return  # when the base changes keys that are cached keep theirs
    ids, mask = batch()
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = stock.generate(ids, attention_mask=mask, eos_token_id=None, **options)
    assert torch.equal(model.generate(ids, mask, eos_token_id=-1, **options), expected)


@pytest.mark.parametrize(("family", "variant"), VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_saves_what_it_loaded(family: str, variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    FAMILIES[family].write(tmp_path / "source", variant, dtype)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=dtype)
    model.save_pretrained(tmp_path / "saved")
    source, saved = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "saved"))
    computed = ("inv_freq", "causal_mask")
    tied = "tied" in variant and variant != "untied"
    head = {"lm_head.weight", "output.weight"} if tied else set()
    kept = {name for name in source if not name.endswith(computed)} - head
    assert saved.keys() == kept
    for name in kept:
        assert saved[name].dtype == dtype and torch.equal(saved[name], source[name]), name
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("source", "saved")]
    assert configs[1] == configs[0] | {"torch_dtype": str(dtype).removeprefix("torch.")}


@pytest.mark.parametrize(("family", "variant"), VARIANTS)
def test_exports_as_its_relative(family: str, variant: str, tmp_path: Path) -> None:
    relative = FAMILIES[family].relative
    FAMILIES[family].write(tmp_path / "source", variant)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    command = ["export", str(tmp_path / "source"), str(tmp_path / "out"), "--as", relative]
    assert main(command) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == relative and "auto_map" not in config
    exported: Any
    info: Any
    exported, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, trust_remote_code=False
    )  # type: ignore[misc]
    assert not info["missing_keys"] and not info["unexpected_keys"]
    compare(exported.eval(), model, 80 if variant in ("dynamic", "rotary") else 12)
    if relative == "llama":  # and collie reads it, by another provider
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        ids, _ = batch()
        torch.testing.assert_close(ours(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    FAMILIES[family].write(tmp_path, "plain", dtype)
    whole, half = (AutoModelForCausalLM.from_pretrained(tmp_path, dtype=d) for d in (torch.float32, dtype))
    seen: list[torch.dtype] = []
    for block in half.blocks.values():
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
        block.register_forward_hook(lambda _, inputs, output: seen.append(output.dtype))
    ids, mask = batch()
    with torch.no_grad():
        expected, found = (model(ids, mask).logits[mask.bool()] for model in (whole, half))
    assert found.dtype == dtype and set(seen) == {dtype}
    error = (found.float() - expected).norm() / expected.norm()
    assert error < (0.01 if dtype == torch.float16 else 0.06)


def test_internlm_rotates_cached_keys_anew(tmp_path: Path) -> None:
    """One layer: what is cached depends on no base, so each step is a whole pass over all tokens."""
    family = FAMILIES["internlm"]
    config = {**family.config, "num_hidden_layers": 1, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    stock = family.stock(config).eval()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.3)
    write_checkpoint(tmp_path, config, stock.state_dict())
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids, mask = batch(60)
    found = model.generate(ids, mask, max_new_tokens=12, eos_token_id=-1)
    for end in range(60, 72):
        whole = torch.nn.functional.pad(mask, (0, end - 60), value=1)
        positions = (whole.cumsum(1) - 1).clamp(min=0)
        logits = model(found[:, :end], whole, positions).logits[:, -1]
        assert torch.equal(logits.argmax(-1), found[:, end]), end
