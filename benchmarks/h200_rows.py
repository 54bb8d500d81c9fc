"""The rows of `h200.py`: what is trained, how we and the peers do it, and what is wanted of us."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from llama import SHAPES, flop_per_token


@dataclass(frozen=True)
class Ours:
    """A config of ours.  sections: over those of the row.  recompute: `train.activation_checkpointing`.

    tok_s, gib: what is wanted of it: at least and at most.
    """

    name: str
    recompute: str | int = "auto"
    sections: dict[str, Any] = field(default_factory=dict)
    tok_s: float | None = None
    gib: float | None = None


@dataclass(frozen=True)
class Peer:
    """transformers with gradient checkpointing.  method: a function of `h200_peers`.  liger: its kernels."""

    name: str
    method: str
    liger: bool = False


@dataclass(frozen=True)
class Row:
    """One workload: `batch` rows of `length` tokens a step; packed: records of mixed lengths (mean 400)."""

    name: str
    sections: dict[str, Any]
    contestants: Sequence[Ours | Peer]
    shape: str = "7b"
    batch: int = 8
    length: int = 2048
    packed: bool = False
    flop_factor: int = 6  # 4 where weights have no gradient

    def flop_per_token(self) -> float:
        """(6 N + 6 layers hidden length), N without the input embedding; no recomputation is counted."""
        seen = MEAN_LENGTH if self.packed else self.length
        return flop_per_token(SHAPES[self.shape], seen, self.flop_factor)


MEAN_LENGTH = 400  # of the records of a packed row
LOMO = {"optimizer": {"name": "lomo", "lr": 1e-3}}
FLOAT8 = {"plugins": [{"name": "float8"}]}
LORA = {
    "adapters": [{"name": "lora", "r": 8, "target_modules": ["q_proj", "v_proj"]}],
    "optimizer": {"name": "adamw", "lr": 1e-4},
}

ROWS = (
    Row(
        "lomo",
        LOMO,
        (
            Ours("bf16", tok_s=14_300),
            Ours("bf16-full", "full"),
            Ours("bf16-offload", "offload", tok_s=11_500, gib=19.5),
            Ours("float8", sections=FLOAT8, tok_s=20_000),
            Ours("float8-full", "full", FLOAT8),
            Ours("float8-offload", "offload", FLOAT8, tok_s=15_500, gib=19.5),
            Ours("rowwise", sections={"plugins": [{"name": "float8", "recipe": "rowwise"}]}),
            Peer("lomo-optim", "lomo"),
        ),
    ),
    Row(
        "lomo-clip",
        {"optimizer": {"name": "lomo", "lr": 1e-3, "clip_grad_norm": 1.0, "clip_mode": "keep"}},
        (Ours("bf16", tok_s=12_500), Peer("lomo-optim", "clipped_lomo")),
    ),
    Row(
        "adalomo",
        {"optimizer": {"name": "adalomo", "lr": 1e-4}},
        (Ours("bf16", tok_s=13_000), Ours("float8", sections=FLOAT8), Peer("lomo-optim", "adalomo")),
    ),
    Row(
        "adamw",
        {"optimizer": {"name": "adamw", "lr": 1e-5, "state_dtype": "bfloat16"}},
        (
            Ours("bf16", tok_s=14_000),
            Ours("float8", sections=FLOAT8, tok_s=19_500),
            Peer("transformers", "adamw"),
            Peer("transformers-liger", "adamw", liger=True),
            Peer("unsloth", "unsloth_full"),
        ),
    ),
    Row(
        "lora",
        LORA,
        (
            Ours("bf16", "none", tok_s=20_000),
            Ours("bf16-offload", "offload", tok_s=14_000, gib=16.0),
            Ours("float8", "none", FLOAT8, tok_s=26_000),
            Peer("peft", "peft"),
            Peer("peft-liger", "peft", liger=True),
            Peer("unsloth", "unsloth_lora"),
        ),
        flop_factor=4,
    ),
    Row(
        "lomo-batch1",
        LOMO,
        (
            Ours("bf16"),
            Ours("bf16-full", "full", tok_s=8_800, gib=14.0),
            Ours("float8", sections=FLOAT8, tok_s=15_000),
            Peer("lomo-optim", "lomo"),
        ),
        batch=1,
    ),
    Row(
        "adamw8bit-13b",
        {"optimizer": {"name": "adamw8bit", "lr": 1e-5, "in_backward": True}},
        (Ours("bf16-full", "full", tok_s=5_000, gib=74.5), Peer("bitsandbytes", "adamw8bit")),
        shape="13b",
    ),
    Row(
        "lomo-65b",
        LOMO,
        (
            Ours("bf16", 66, tok_s=1_180),
            Ours("float8", 66, FLOAT8, tok_s=1_430),
            Peer("lomo-optim", "lomo"),
        ),
        shape="65b",
        batch=1,
    ),
    Row(
        "lomo-32k",
        LOMO,
        (Ours("bf16-selective", "selective", tok_s=7_200, gib=40.0), Peer("lomo-optim", "lomo")),
        batch=1,
        length=32_768,
    ),
    Row("lomo-packed", LOMO, (Ours("bf16"), Peer("lomo-optim", "lomo")), packed=True),
)


def chosen(patterns: Sequence[str]) -> list[tuple[Row, Ours | Peer]]:
    """What `lomo`, `lomo:float8` or patterns like `*:bf16` mean.  Raises LookupError for one of nothing."""
    pairs = [(row, contestant) for row in ROWS for contestant in row.contestants]
    names = {f"{row.name}:{contestant.name}": (row, contestant) for row, contestant in pairs}
    found: list[str] = []
    for pattern in patterns:
        fitting = [name for name in names if fnmatchcase(name, pattern if ":" in pattern else f"{pattern}:*")]
        if not fitting:
            raise LookupError(f"{pattern!r} is none of: {', '.join(names)}")
        found += fitting
    return [pair for name, pair in names.items() if name in found]
