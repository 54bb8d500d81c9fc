"""Generation with a key-value cache: greedy or sampled, any padding on the left."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from collie_core.errors import UserError
from collie_core.files import read_json_object
from collie_core.models.forward import (
    model_context,
    parts,
    require_shape,
    require_weights,
    run_blocks,
    with_virtual_tokens,
)
from collie_core.ops import Context, KVCache

_log = logging.getLogger(__name__)


#: Logits (B, V) after the last of new_ids (B, S), whose keys and values are put into the cache.
NextLogits = Callable[[Tensor, Context, KVCache], Tensor]


@dataclass(frozen=True)
class GenerationOptions:
    """The options of `generate`, which says what they mean.  Raises UserError for those without sense."""

    max_new_tokens: int = 256
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    stop_strings: Sequence[str] | None = None
    tokenizer: Any = None
    streamer: Callable[[Tensor], None] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise UserError(f"generate: max_new_tokens={self.max_new_tokens}, expected 0 or more")
        if self.temperature <= 0:
            raise UserError(
                f"generate: temperature={self.temperature}, expected above 0 (do_sample=False is greedy)"
            )
        if self.top_k < 0:
            raise UserError(f"generate: top_k={self.top_k}, expected 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"generate: top_p={self.top_p}, expected above 0 and at most 1")
        if self.repetition_penalty <= 0:
            raise UserError(f"generate: repetition_penalty={self.repetition_penalty}, expected above 0")
        if self.stop_strings and self.tokenizer is None:
            raise UserError("generate: stop_strings need the tokenizer")


def generate(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int = 256,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    stop_strings: Sequence[str] | None = None,
    tokenizer: Any = None,
    streamer: Callable[[Tensor], None] | None = None,
    seed: int | None = None,
) -> Tensor:
    """Prompts and continuations, int64 (B, S + at most max_new_tokens); a finished row is filled with pad.

    input_ids: int64 (B, S), padded on the left.  attention_mask: (B, S), 1 for a token.
    do_sample: draw from the distribution after temperature, top_k (0: off) and top_p, in that order;
    otherwise the most likely token is taken.  repetition_penalty applies to both (Keskar et al. 2019).
    eos_token_id: one or several; None takes those of the model's generation_config.json or config, -1 never
    stops.  pad_token_id: None takes the config's, else the first end-of-sequence token, else 0.
    stop_strings: a row ends with the token that completes one of them; needs `tokenizer`.
    streamer: called with the new tokens of each step, int64 (B,) on the CPU.  seed: of the draws alone.
    A model without positions beyond some number ends there, with a warning.
    Raises UserError for options that make no sense.
    """
    options = GenerationOptions(
        max_new_tokens,
        do_sample,
        temperature,
        top_k,
        top_p,
        repetition_penalty,
        eos_token_id,
        pad_token_id,
        stop_strings,
        tokenizer,
        streamer,
        seed,
    )
    require_weights(model)

    def next_logits(new_ids: Tensor, ctx: Context, cache: KVCache) -> Tensor:
        h = run_blocks(model, new_ids, ctx, cache)
        logits: Tensor = parts(model).head(h[:, -1:], ctx)
        return logits[:, -1]

    was_training = model.training
    model.eval()
    try:
        return generate_with(
            next_logits,
            model,
            input_ids.to(next(model.parameters()).device),
            attention_mask,
            options,
            list(parts(model).blocks),
        )
    finally:
        model.train(was_training)


@torch.no_grad()
def generate_with(
    next_logits: NextLogits,
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    options: GenerationOptions,
    blocks: Sequence[str],
    agree: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """`generate` where `next_logits` runs the forward pass, whatever the layout.

    model: asked for contexts, positions and special ids alone.  blocks: names of the blocks that
    `next_logits` runs here, each of which gets a cache.  input_ids: on the device of the logits.
    agree: makes the tokens (B,) that one of several processes chose those of all; their logits may differ in
    the last bit.
    """
    require_shape("attention_mask", attention_mask, input_ids)
    if attention_mask is not None and not bool(attention_mask[:, -1].all()):
        raise UserError("generate: pad the prompts on the left; a row of attention_mask ends with padding")
    eos, pad = _special_ids(model, options.eos_token_id, options.pad_token_id)
    stopped = _Stops(eos, options.stop_strings or [], options.tokenizer, input_ids.shape[1])
    choose = _Chooser(options, _generator(options.seed, input_ids.device), agree)
    with _as_written():
        return _loop(next_logits, model, input_ids, attention_mask, options, choose, stopped, pad, blocks)


def _as_written() -> AbstractContextManager[Any]:
    """Compiled blocks run uncompiled: a growing cache would have them compiled anew again and again."""
    if "torch._dynamo" in sys.modules:  # importing it takes a second, and without it nothing is compiled
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


def _loop(
    next_logits: NextLogits,
    model: nn.Module,
    ids: Tensor,
    attention_mask: Tensor | None,
    options: GenerationOptions,
    choose: _Chooser,
    stopped: _Stops,
    pad: int,
    blocks: Sequence[str],
) -> Tensor:
    new, attention_mask = with_virtual_tokens(model, ids, attention_mask)
    steps = _steps(model, new.shape[1], options.max_new_tokens)
    mask = torch.ones_like(new) if attention_mask is None else attention_mask.to(new)
    padded = not bool(mask.all())
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    ctx = model_context(model, Context(new, positions, attention_mask=mask.bool() if padded else None))
    advance: Callable[[Tensor], Tensor] = getattr(model, "next_positions", _next_positions)
    cache = KVCache(list(blocks), capacity=new.shape[1] + steps)
    running = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    for _ in range(steps):
        token = choose(next_logits(new, ctx, cache).float(), ids).masked_fill(~running, pad)
        ids = torch.cat([ids, token.unsqueeze(1)], 1)
        if options.streamer is not None:
            options.streamer(token.cpu())
        if stopped.possible:
            running = running & ~stopped(ids)
            if not bool(running.any()):
                break
        new = token.unsqueeze(1)
        ctx = ctx.following(new, advance(ctx.positions))
    return ids


def _next_positions(positions: Tensor) -> Tensor:
    return positions[..., -1:] + 1


def _steps(model: nn.Module, prompt: int, wanted: int) -> int:
    """How many tokens there are positions for."""
    limit: int | None = getattr(model, "max_positions", None)
    if limit is None or prompt + wanted <= limit:
        return wanted
    left = max(limit - prompt, 0)
    _log.warning(
        "generate: the model has %d positions and the prompt takes %d: %d new tokens instead of %d",
        limit,
        prompt,
        left,
        wanted,
    )
    return left


@dataclass
class _Chooser:
    """The next token (B,) from logits (B, V) and the ids so far (B, S)."""

    options: GenerationOptions
    generator: torch.Generator | None
    agree: Callable[[Tensor], Tensor] | None = None

    def __call__(self, logits: Tensor, ids: Tensor) -> Tensor:
        token = self._choose(logits, ids)
        return token if self.agree is None else self.agree(token)

    def _choose(self, logits: Tensor, ids: Tensor) -> Tensor:
        options = self.options
        if options.repetition_penalty != 1.0:
            seen = logits.gather(1, ids)
            seen = torch.where(seen < 0, seen * options.repetition_penalty, seen / options.repetition_penalty)
            logits = logits.scatter(1, ids, seen)
        if not options.do_sample:
            return logits.argmax(-1)
        logits = logits / options.temperature
        if 0 < options.top_k < logits.shape[-1]:
            least = logits.topk(options.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if options.top_p < 1.0:
            # dropped: what comes after the likeliest tokens that together have top_p; the first always stays
            ordered, order = logits.sort(descending=True)
            probabilities = ordered.softmax(-1)
            dropped = probabilities.cumsum(-1) - probabilities >= options.top_p
            dropped[:, 0] = False
            dropped = torch.zeros_like(dropped).scatter(1, order, dropped)
            logits = logits.masked_fill(dropped, -torch.inf)
        return torch.multinomial(logits.softmax(-1), 1, generator=self.generator).squeeze(1)


@dataclass
class _Stops:
    """Which rows end with their last token."""

    eos: list[int]
    strings: Sequence[str]
    tokenizer: Any
    prompt_length: int

    @property
    def possible(self) -> bool:
        return bool(self.eos or self.strings)

    def __call__(self, ids: Tensor) -> Tensor:
        last = ids[:, -1]
        ended = torch.isin(last, torch.tensor(self.eos, dtype=last.dtype, device=last.device))
        if self.strings:
            # a character may take four byte tokens: so many tokens hold the longest string in any case
            tail = max(self.prompt_length, ids.shape[1] - 4 * max(map(len, self.strings)) - 8)
            texts = [self.tokenizer.decode(row) for row in ids[:, tail:].tolist()]
            found = [any(string in text for string in self.strings) for text in texts]
            ended = ended | torch.tensor(found, device=last.device)
        return ended


def _special_ids(model: nn.Module, eos: int | Sequence[int] | None, pad: int | None) -> tuple[list[int], int]:
    """End-of-sequence ids (empty: never stop) and the pad id, with the model's own where None is given."""
    defaults = _generation_defaults(model) if eos is None or pad is None else {}
    eos = defaults.get("eos_token_id") if eos is None else eos
    stops = [token for token in ([eos] if isinstance(eos, int) else eos or []) if token >= 0]
    pad = defaults.get("pad_token_id") if pad is None else pad
    if not isinstance(pad, int) or pad < 0:
        pad = stops[0] if stops else 0
    return stops, pad


def _generation_defaults(model: nn.Module) -> dict[str, Any]:
    """config.json's special ids, the provider's corrections of them, and generation_config.json's."""
    origin = getattr(model, "origin", None)
    if origin is None:
        return {}
    keys = ("eos_token_id", "pad_token_id")
    found = {key: getattr(origin.config, key, origin.hf_config.get(key)) for key in keys}
    path = origin.path / "generation_config.json" if origin.path else None
    if path is not None and path.is_file():
        stated = read_json_object(path)
        found |= {key: stated[key] for key in keys if stated.get(key) is not None}
    return found


def _generator(seed: int | None, device: torch.device) -> torch.Generator | None:
    return None if seed is None else torch.Generator(device).manual_seed(seed)
