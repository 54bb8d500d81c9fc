"""What benchmarks on LLaMA shapes share: sizes, a config, the cost of a token, jobs of several processes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
SHAPES: dict[str, dict[str, int]] = {
    name: dict(zip(_SIZES, sizes, strict=True))
    for name, sizes in {
        "tiny": (64, 96, 2, 4, 512),
        "small": (256, 688, 6, 8, 4096),
        "1b": (2048, 5504, 22, 16, 32000),
        "7b": (4096, 11008, 32, 32, 32000),
        "13b": (5120, 13824, 40, 40, 32000),
        "65b": (8192, 22016, 80, 64, 32000),
    }.items()
}
#: dense bf16 of an H100 or H200 as measured, flop/s; of float8 too, so that MFUs compare
PEAK_FLOPS = 790e12
_CARDS = ("NVIDIA H200", "NVIDIA H100 80GB HBM3")


def hf_config(shape: Mapping[str, int], positions: int = 4096) -> dict[str, Any]:
    """The contents of a LLaMA's config.json."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **shape,
    }


def flop_per_token(shape: Mapping[str, int], length: int, factor: int = 6) -> int:
    """factor x (N + layers hidden length), N without the input embedding; no recomputation is counted."""
    hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
    block = 4 * hidden**2 + 3 * hidden * shape["intermediate_size"]
    return factor * (layers * block + hidden * shape["vocab_size"] + layers * hidden * length)


def mfu(tokens_per_second: float, flop: int) -> float | None:
    """The share of the card's peak, `flop` being a token's; None where the device is another."""
    known = torch.cuda.is_available() and torch.cuda.get_device_name() in _CARDS
    return tokens_per_second * flop / PEAK_FLOPS if known else None


class Ids:
    """Stands for a tokenizer where records are tokens already."""

    pad_token_id, eos_token_id, chat_template, all_special_ids = 0, 2, None, (0, 2)

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def save_pretrained(self, folder: str) -> None:
        """Nothing to save."""


def run_job(script: str, job: Mapping[str, Any], file: Path, processes: int) -> int:
    """`python SCRIPT --job FILE` as so many processes, `job` being what the file holds; the job's status."""
    from collie_core.launch.launcher import launch

    file.write_text(json.dumps(job))
    path = Path(script).resolve()
    # ranks do not look for modules beside their script
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(path.parent), os.environ.get("PYTHONPATH")]))
    return launch([str(path), "--job", str(file)], processes, stop_grace=10.0)
