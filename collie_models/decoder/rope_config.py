"""Rotary settings as `config.json` spells them, in transformers 4 (rope_scaling) and 5 (rope_parameters)."""

from __future__ import annotations

import math
from collections.abc import Callable

from collie_core.plugin import ConfigError
from collie_models.decoder.config_reader import ConfigReader
from collie_models.decoder.rope_scaling import Dynamic, Linear, Llama3, LongRope, Scaling, Unscaled, Yarn
from collie_models.decoder.rotary import Rotary


def read_rotary(config: ConfigReader, dim: int, max_positions: int) -> Rotary:
    """Half-split rotary over `dim` channels.

    Raises ConfigError for an unknown type, key or value, and where both spellings are used and differ.
    """
    stated = [key for key in ("rope_parameters", "rope_scaling") if config.content.get(key)]
    found = [_read(config, key, dim, max_positions) for key in stated or ["rope_parameters"]]
    if found[0] != found[-1]:  # transformers takes rope_scaling, and with it another rope_theta
        raise ConfigError(
            f"{config.where}rope_parameters and rope_scaling are both given and differ; say in one of them, "
            "with rope_theta, what is meant"
        )
    return found[0]


def _read(config: ConfigReader, key: str, dim: int, max_positions: int) -> Rotary:
    """What one of the two mappings says, with the keys beside it."""
    stated = config.content.get(key) or {}
    if not isinstance(stated, dict):
        raise config.wrong(key, "a mapping")
    rope = ConfigReader(stated, f"{config.where}{key}.")
    theta = rope.number("rope_theta", config.number("rope_theta", 10000.0))
    rope.refuse_unless("partial_rotary_factor", 1, 1.0)
    type_key = "rope_type" if "rope_type" in stated else "type"
    known, read = rope.choice(type_key, _TYPES, "default")
    rope.refuse_others([*_COMMON_KEYS, *known])
    original = config.content.get("original_max_position_embeddings")
    if original is None:
        original = rope.content.get("original_max_position_embeddings")
    original = max_positions if original is None else int(original)
    return Rotary(dim, theta, scaling=read(rope, dim, max_positions, original))


_COMMON_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
_Reader = Callable[[ConfigReader, int, int, int], Scaling]


def _default(rope: ConfigReader, dim: int, max_positions: int, original: int) -> Scaling:
    return Unscaled()


def _linear(rope: ConfigReader, dim: int, max_positions: int, original: int) -> Scaling:
    return Linear(rope.number("factor"))


def _dynamic(rope: ConfigReader, dim: int, max_positions: int, original: int) -> Scaling:
    return Dynamic(rope.number("factor"), max_positions)


def _llama3(rope: ConfigReader, dim: int, max_positions: int, original: int) -> Scaling:
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if low >= high:
        raise rope.wrong("high_freq_factor", f"above low_freq_factor ({low})")
    return Llama3(rope.number("factor"), low, high, original)


def _yarn(rope: ConfigReader, dim: int, max_positions: int, original: int) -> Scaling:
    factor = rope.number("factor", max_positions / original)

    def magnitude(scale: float) -> float:  # eq. 22 of the paper, as DeepSeek generalised it
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    scales = [rope.content.get(key) for key in ("mscale", "mscale_all_dim")]
    if scales[0] and scales[1]:
        attention = magnitude(float(scales[0])) / magnitude(float(scales[1]))
    else:
        attention = magnitude(1.0)
    return Yarn(
        factor,
        original,
        attention_factor=rope.number("attention_factor", attention),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        truncate=rope.flag("truncate", True),
    )


def _longrope(rope: ConfigReader, dim: int, max_positions: int, original: int) -> Scaling:
    factor = rope.number("factor", max_positions / original)
    attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return LongRope(
        rope.numbers("short_factor", dim // 2),
        rope.numbers("long_factor", dim // 2),
        original,
        attention_factor=rope.number("attention_factor", attention),
    )


#: rope_type -> (keys of its own, how it is read)
_TYPES: dict[str, tuple[tuple[str, ...], _Reader]] = {
    "default": ((), _default),
    "linear": (("factor",), _linear),
    "dynamic": (("factor", "original_max_position_embeddings"), _dynamic),
    "llama3": (
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        _llama3,
    ),
    "yarn": (
        (
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
            "finetuned",  # of the authors' checkpoints: what their other, dynamic variant begins with
        ),
        _yarn,
    ),
    "longrope": (
        ("factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"),
        _longrope,
    ),
}
