"""Write `work/`: a small random Acme model with a tokenizer, and sentences to train on.

Usage: python prepare.py, then: collie train train.yaml
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CONFIG: dict[str, Any] = {
    "model_type": "acme",
    "architectures": ["AcmeDecoder"],
    "vocab_size": 300,
    "width": 48,
    "depth": 2,
    "heads": 4,
    "max_positions": 96,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
COLOURS = ("red", "green", "blue", "black", "white", "yellow")
THINGS = ("house", "tree", "river", "stone", "bird", "cloud", "door", "lamp")


def sentences() -> list[str]:
    """Forty-eight sentences with a pattern that a small model can learn."""
    return [
        f"The {thing} near the {colour} {thing} is {colour} too." for thing in THINGS for colour in COLOURS
    ]


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer with <s>, </s> and <pad>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(), trainer)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def random_weights() -> dict[str, torch.Tensor]:
    """Tensors under the names of Acme's own checkpoints."""
    vocabulary, width, depth = CONFIG["vocab_size"], CONFIG["width"], CONFIG["depth"]
    fused = width + 2 * (width // CONFIG["heads"])
    matrices = {"wte": (vocabulary, width), "wpe": (CONFIG["max_positions"], width)}
    biases: dict[str, int] = {}
    norms = ["ln"]
    for layer in [f"layers.{index}" for index in range(depth)]:
        norms += [f"{layer}.ln1", f"{layer}.ln2"]
        matrices |= {f"{layer}.qkv.weight": (fused, width), f"{layer}.out.weight": (width, width)}
        # the two matrices of the MLP are stored transposed
        matrices |= {f"{layer}.up.weight": (width, 4 * width), f"{layer}.down.weight": (4 * width, width)}
        biases |= {f"{layer}.qkv.bias": fused, f"{layer}.out.bias": width}
        biases |= {f"{layer}.up.bias": 4 * width, f"{layer}.down.bias": width}
    torch.manual_seed(0)
    return {
        **{name: torch.randn(shape) * 0.05 for name, shape in matrices.items()},
        **{name: torch.zeros(size) for name, size in biases.items()},
        **{f"{name}.weight": torch.ones(width) for name in norms},
        **{f"{name}.bias": torch.zeros(width) for name in norms},
    }


def main() -> None:
    """Write model, tokenizer and data."""
    folder = Path("work")
    (folder / "model").mkdir(parents=True, exist_ok=True)
    (folder / "model" / "config.json").write_text(json.dumps(CONFIG, indent=2))
    save_file(random_weights(), folder / "model" / "model.safetensors")
    write_tokenizer(folder / "model")
    for name, chosen in (("train", sentences()[1:]), ("eval", sentences()[:1])):
        lines = [json.dumps({"text": sentence}) + "\n" for sentence in chosen * 4]
        (folder / f"{name}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()
