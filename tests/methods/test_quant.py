"""collie-quant: values, training on top of quantised weights, memory, merging, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

import bitsandbytes.functional as bnb
import pytest
import torch
import yaml
from adapter_runs import IDS, adapter_of, lora_config, own_logits
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from training_helpers import config, losses, metrics

from collie_core import AutoModelForCausalLM, Trainer
from collie_core.checkpoint.store import read_metadata
from collie_core.cli.methods import methods
from collie_core.errors import UserError
from collie_core.models.packed import pack_piece, packed_product
from collie_core.plugin import CheckpointError, Piece, Run, hookimpl
from collie_core.registry import Registry
from collie_core.registry.options import validate_options
from collie_methods.quant.adapter import Quantiser
from collie_methods.quant.formats import BlockFormat, Int8, Nf4

KINDS = ["nf4", "int8"]
FORMATS: dict[str, type[BlockFormat]] = {"nf4": Nf4, "int8": Int8}
LORA = {"name": "lora", "r": 4}


def base(kind: str, **options: Any) -> dict[str, Any]:
    return {"name": kind, "block_size": 32, **options}


def theirs(kind: str, row: Tensor, block: int) -> Tensor:
    """What bitsandbytes makes of one row."""
    if kind == "nf4":
        return bnb.dequantize_4bit(*bnb.quantize_4bit(row, blocksize=block, quant_type="nf4")).flatten()
    code = bnb.create_linear_map(signed=True, total_bits=8)
    return bnb.dequantize_blockwise(*bnb.quantize_blockwise(row, code=code, blocksize=block))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [32, 64, 256])
def test_values_are_those_of_bitsandbytes_row_by_row(kind: str, block: int) -> None:
    values = torch.randn(6, 768, generator=torch.Generator().manual_seed(0))
    values[2, :block] = 0.0
    packing = FORMATS[kind](block, {})
    stored = packing.pack(values)
    assert stored.shape == (6, 768 // block * packing.block_bytes) and stored.dtype == torch.uint8
    found = packing.unpack(stored, torch.float32)
    for row, got in zip(values, found, strict=True):
        assert torch.equal(got, theirs(kind, row, block))
    worst = float((found - values).abs().max() / values.abs().max())
    assert worst < (0.16 if kind == "nf4" else 0.004)


@pytest.mark.parametrize("kind", KINDS)
def test_a_piece_is_packed_as_it_lies_in_the_whole(kind: str) -> None:
    values = torch.randn(10, 256, generator=torch.Generator().manual_seed(1))
    packing = FORMATS[kind](64, {})
    whole = packing.pack(values)
    piece = Piece(
        torch.zeros(4, 2 * packing.block_bytes, dtype=torch.uint8), whole.shape, (3, packing.block_bytes)
    )

    def fill(part: Piece) -> None:
        part.local.copy_(values[part.slices])

    pack_piece(packing, piece, fill)
    assert torch.equal(piece.local, whole[piece.slices])


@pytest.mark.parametrize("kind", KINDS)
def test_declared_bytes_are_those_of_packed_weights(kind: str) -> None:
    [declared] = [method.weights for method in methods() if method.name == kind]
    plugin: Any = Registry().load("adapter", kind).cls
    sizes = get_args(get_type_hints(plugin.Options)["block_size"])
    assert len(declared) == len(sizes)
    for options, size in declared.items():
        chosen: Any = validate_options(plugin, yaml.safe_load(f"{{{options}}}"))
        model = nn.Module()
        model.blocks = nn.ModuleDict({"0": nn.Linear(2048, 3)})
        Quantiser(kind, chosen).adapt(model)
        packed = model.get_parameter("blocks.0.weight")
        assert packed.numel() * packed.element_size() == size * 3 * 2048, options


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_product_keeps_no_unpacked_weight(kind: str) -> None:
    torch.manual_seed(0)
    packing = FORMATS[kind](64, {})
    stored = [packing.pack(0.1 * torch.randn(512, 512)) for _ in range(2)]
    trained = nn.Parameter(0.1 * torch.randn(512, 512))

    def block(x: Tensor) -> Tensor:
        inner = (packed_product(x, stored[0], packing) * x).relu() @ trained
        return x + packed_product(inner, stored[1], packing)

    def outcome(run: Callable[[Tensor], Tensor]) -> tuple[list[Tensor], int]:
        """(output and gradients, bytes of the largest tensor that is kept but the weights)."""
        own = {tensor.data_ptr() for tensor in (*stored, trained)}
        kept = [0]

        def note(tensor: Tensor) -> Tensor:
            kept.append(0 if tensor.data_ptr() in own else tensor.nbytes)
            return tensor

        x = torch.linspace(-1, 1, 8 * 512).view(8, 512).requires_grad_()
        trained.grad = None
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = run(x)
        out.square().sum().backward()
        return [tensor for tensor in (out.detach(), x.grad, trained.grad) if tensor is not None], max(kept)

    (plain, _), (compiled, largest) = outcome(block), outcome(torch.compile(block, fullgraph=True))
    for expected, found in zip(plain, compiled, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert largest <= 8 * 512 * 4  # activations: a whole weight has 64 times as many


class Watcher:
    """The shards of a run after it."""

    def __init__(self) -> None:
        self.packed: set[str] = set()

    @hookimpl
    def collie_backward_end(self, run: Run) -> None:
        self.packed = {name for name, shard in run.shards.items() if shard.local.dtype == torch.uint8}
        assert not any(run.shards[name].local.requires_grad for name in self.packed)


@pytest.mark.parametrize("kind", KINDS)
def test_training_merging_and_evaluating(
    kind: str, make_llama: Callable[..., Path], data_file: Path, tmp_path: Path
) -> None:
    model_folder = make_llama(hidden_size=64, intermediate_size=128)
    out, watcher = tmp_path / "run", Watcher()
    data = {"train": str(data_file), "eval": str(data_file), "max_length": 64}
    sections = base(kind, block_size=64, skip_modules=["up_proj"]), LORA
    result = Trainer(
        lora_config(model_folder, data_file, out, *sections, data=data), callbacks=[watcher]
    ).train()
    assert losses(out)[-1] < losses(out)[0]
    assert "blocks.0.attention.q_proj.weight" in watcher.packed
    assert all(name.startswith("blocks.") and "up_proj" not in name for name in watcher.packed)
    checkpoint = out / "checkpoints/step_000004"
    stored = read_metadata(checkpoint).tensors
    assert all(".adapters." in name for name in stored if not name.startswith("layout."))
    for path in (adapter_of(result), checkpoint):
        assert Trainer(config(path, data_file, tmp_path / "none", data=data)).evaluate() == result.evaluation
    ours = own_logits(adapter_of(result))
    model = AutoModelForCausalLM.from_pretrained(adapter_of(result))
    model.merge_adapters()
    model.save_pretrained(tmp_path / "merged")
    assert float((ours - own_logits(tmp_path / "merged")).abs().max()) < 2e-5
    merged, original = load_file(tmp_path / "merged/model.safetensors"), load_file(
        model_folder / "model.safetensors"
    )
    name = "model.layers.0.self_attn.q_proj.weight"
    adapter = load_file(adapter_of(result) / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    change = 4.0 * adapter[f"{prefix}B.weight"] @ adapter[f"{prefix}A.weight"]
    quantised = torch.stack([theirs(kind, row, 64) for row in original[name].float()])
    torch.testing.assert_close(merged[name], quantised + change, rtol=1e-5, atol=1e-6)


def test_stock_peft_reads_the_adapter_on_a_base_that_bitsandbytes_quantised(
    make_llama: Callable[..., Path], data_file: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM as Stock
    from transformers import BitsAndBytesConfig

    model = make_llama(hidden_size=64, intermediate_size=128)  # rows of whole blocks, as theirs are then
    result = Trainer(lora_config(model, data_file, tmp_path / "run", {"name": "nf4"}, LORA)).train()
    adapter = adapter_of(result)
    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    stock: Any = Stock.from_pretrained(model, quantization_config=how, dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(adapter)
    compared = 0
    for name, module in stock.model.layers.named_modules():
        if isinstance(module, Linear4bit):
            compared += 1
            packed: Any = module.weight
            weight = bnb.dequantize_4bit(packed.data, packed.quant_state)
            own: Any = ours.get_submodule(f"blocks.{name.replace('self_attn', 'attention')}")
            assert torch.equal(weight.cpu(), own.matrix(torch.float32).cpu()), name
    assert compared == 7 * len(stock.model.layers)
    peft: Any = PeftModel.from_pretrained(stock, str(adapter)).eval()
    for module in peft.modules():
        if isinstance(module, Linear4bit):
            module.train()  # else bitsandbytes multiplies in bf16 on CPUs that can (AVX512-BF16)
    with torch.no_grad():
        difference = peft(IDS.to(peft.device)).logits.cpu() - ours(IDS).logits
    assert float(difference.abs().max()) < 1e-5


@pytest.mark.parametrize("variant", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_variants_of_lora_see_the_quantised_values(
    variant: dict[str, Any], tiny_llama: Path, data_file: Path, tmp_path: Path
) -> None:
    runs = {}
    for name, section in (("varied", {**LORA, **variant}), ("plain", LORA)):
        runs[name] = tmp_path / name
        Trainer(lora_config(tiny_llama, data_file, runs[name], base("nf4"), section)).train()
    assert losses(runs["varied"])[0] == pytest.approx(losses(runs["plain"])[0], abs=1e-5)
    assert losses(runs["varied"])[-1] < losses(runs["varied"])[0]


def test_bfloat16_and_a_model_given_as_an_object(tiny_llama: Path, data_file: Path, tmp_path: Path) -> None:
    low = {"model": {"path": str(tiny_llama), "dtype": "bfloat16"}}
    out = tmp_path / "low"
    Trainer(lora_config(tiny_llama, data_file, out, base("nf4"), LORA, **low)).train()
    assert losses(out)[-1] < losses(out)[0]
    given = AutoModelForCausalLM.from_pretrained(tiny_llama)
    for out, model in ((tmp_path / "given", given), (tmp_path / "read", None)):
        Trainer(lora_config(tiny_llama, data_file, out, base("nf4"), LORA), model=model).train()
    assert losses(tmp_path / "given") == losses(tmp_path / "read")


def test_the_default_rate_is_that_of_the_adapter_on_top(
    tiny_llama: Path, data_file: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"optimizer": {"name": "adamw"}, "train": {"max_steps": 1}}
    Trainer(lora_config(tiny_llama, data_file, tmp_path / "out", base("nf4"), LORA, **changes)).train()
    assert metrics(tmp_path / "out")[0]["lr"] == pytest.approx(2e-4)


PEAK = """
import re, sys
from pathlib import Path
import torch, bitsandbytes
from collie_core.models.auto import build_model
from collie_core.models.provider import select_provider
from collie_core.models.sources import load_selected
from collie_methods.quant.adapter import Quantiser
from collie_methods.quant.formats import Nf4
from collie_methods.quant.plugin import QuantOptions
selected = select_provider(sys.argv[1])
model = build_model(selected)
if sys.argv[2] == "nf4":
    Quantiser("nf4", QuantOptions()).adapt(model)
def peak():  # of this program; getrusage's is that of the process it was forked from, where larger
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1))
Nf4(64, {}).pack(torch.ones(8, 1024))  # what the libraries take once
before = peak()
load_selected(model, selected, device="cpu", dtype=torch.bfloat16)
print(peak() - before)
"""


def test_no_unquantised_model_is_ever_in_memory(tmp_path: Path) -> None:
    ones = partial(torch.ones, dtype=torch.bfloat16)
    hidden, inner, layers, vocabulary = 1024, 4096, 12, 64
    settings = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    tensors = {
        "model.embed_tokens.weight": ones(vocabulary, hidden),
        "lm_head.weight": ones(vocabulary, hidden),
        "model.norm.weight": ones(hidden),
    }
    for layer in range(layers):
        name = f"model.layers.{layer}"
        tensors |= {f"{name}.self_attn.{x}_proj.weight": ones(hidden, hidden) for x in "qkvo"}
        tensors |= {f"{name}.mlp.{x}_proj.weight": ones(inner, hidden) for x in ("gate", "up")}
        tensors[f"{name}.mlp.down_proj.weight"] = ones(hidden, inner)
        tensors |= {f"{name}.{x}_layernorm.weight": ones(hidden) for x in ("input", "post_attention")}
    save_file(tensors, tmp_path / "model.safetensors")
    size = (tmp_path / "model.safetensors").stat().st_size / 1024  # 400 MB
    peak = {}
    for kind in ("nf4", "none"):
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(tmp_path), kind], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        peak[kind] = int(done.stdout)
    assert peak["none"] > 0.95 * size
    # 0.28 of it are the packed weights; the rest is what two threads pack at a time
    assert peak["nf4"] < 0.45 * size


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ([{"name": "nf4"}, LORA], ["q_proj has 32 inputs", "block of 64", "block_size"]),
        ([base("nf4")], ["nothing is trained on top"]),
        ([base("nf4"), base("int8"), LORA], ["keep one of them"]),
        ([base("nf4", skip_modules=["o_prj"]), LORA], ["'o_prj' fits no linear", "o_proj"]),
        ([base("nf4", skip_modules=["*"]), LORA], ["adapter nf4: skip_modules leaves no linear"]),
        ([base("nf4", block_size=48), LORA], ["block_size", "48"]),
    ],
)
def test_refusals(
    sections: list[dict[str, Any]], words: list[str], tiny_llama: Path, data_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        Trainer(lora_config(tiny_llama, data_file, tmp_path / "run", *sections)).train()
    assert all(word in str(caught.value) for word in words), caught.value
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_damaged_record_of_the_base_is_refused(tiny_llama: Path, data_file: Path, tmp_path: Path) -> None:
    result = Trainer(lora_config(tiny_llama, data_file, tmp_path / "run", base("nf4"), LORA)).train()
    (adapter_of(result) / "collie_base.json").write_text('{"adapters": [3]}')
    with pytest.raises(CheckpointError, match="collie_base.json: adapters: expected a list"):
        AutoModelForCausalLM.from_pretrained(adapter_of(result))
