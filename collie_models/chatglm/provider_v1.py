"""ChatGLM-6B's config, weight map, and its own positions and mask, which follow from the ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from collie_core.errors import UserError
from collie_core.ops.attention import dense_mask
from collie_core.plugin import ConfigError, Context, Ignore, Rename, Split, WeightRule
from collie_models.decoder.config import DecoderConfig
from collie_models.decoder.config_reader import ConfigReader
from collie_models.decoder.model import Decoder
from collie_models.decoder.provider import DecoderProvider
from collie_models.decoder.rope_scaling import HalfPrecision
from collie_models.decoder.rotary import Rotary2D

if TYPE_CHECKING:
    from collie_core.models.causal_lm import CausalLMOutput
    from collie_core.ops import Ops

_ALPHA = 56**0.5  # (2 layers)^0.5 of DeepNorm; the original takes 28 layers whatever their number

_KEYS = (
    *("vocab_size", "hidden_size", "num_layers", "num_attention_heads", "inner_hidden_size"),
    *("layernorm_epsilon", "mask_token_id", "gmask_token_id", "tie_word_embeddings", "initializer_range"),
    *("max_sequence_length", "num_image_tokens"),  # the tables of positions grow with the input
)
#: key -> the values that are computed here
_ONLY = {
    "position_encoding_2d": (True,),
    "pre_seq_len": (0,),
    "prefix_projection": (False,),
    "quantization_bit": (0,),
    "quantization_embeddings": (False,),
}


@dataclass(frozen=True)
class ChatGLMConfig(DecoderConfig):
    """A decoder's options, and the tokens that its positions depend on."""

    sop_token_id: int = 130004
    mask_token_id: int = 130000
    gmask_token_id: int = 130001


class ChatGLMForCausalLM(Decoder):
    """A ChatGLM-6B.  `from_pretrained` reads a folder or hub repository in Hugging Face layout.

    Everything before <sop> is seen by all, and what comes from it on has the position of [gMASK] (else
    [MASK]) and counts in a second row.  position_ids, where they are given, are (B, 2, S).
    """

    def __init__(self, config: ChatGLMConfig, ops: Ops) -> None:
        super().__init__(config, ops)
        self.config = config

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> CausalLMOutput:
        """As of any model; attention_mask may also be the original's (B, 1, S, S), true where it hides."""
        return super().forward(input_ids, self._tokens(input_ids, attention_mask), position_ids, labels)

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """As of any model; attention_mask may also be the original's (B, 1, S, S), true where it hides."""
        return super().generate(input_ids, self._tokens(input_ids, attention_mask), **options)

    def _tokens(self, input_ids: Tensor, mask: Tensor | None) -> Tensor | None:
        """(B, S) of a mask (B, 1, S, S).  Raises UserError for one that does not follow from the ids."""
        if mask is None or mask.ndim == 2:
            return mask
        size = input_ids.shape[1]
        if mask.shape[1:] != (1, size, size) or mask.dtype != torch.bool:
            raise UserError(
                f"attention_mask: expected (batch, length), or bool (batch, 1, length, length), got "
                f"{mask.dtype} {tuple(mask.shape)}"
            )
        visible = ~mask.to(input_ids.device)
        tokens = visible[:, 0, -1]
        ctx = self._with_prefix(Context.build(input_ids, tokens))
        expected = dense_mask(ctx, size, size)
        if bool((visible != expected)[:, 0][tokens].any()):
            raise UserError("attention_mask: hides other tokens than ChatGLM-6B's prefix and order do")
        return tokens

    def prepare_context(self, ctx: Context) -> Context:
        """Positions (B, 2, S), their rotary angles and the prefix, record by record in packed rows.

        Raises UserError for given positions of another shape.
        """
        ctx = self._with_prefix(ctx)
        self.rotary.angles(ctx)
        return ctx

    def _with_prefix(self, ctx: Context) -> Context:
        """Positions and the prefix.

        A record without <sop> is all answer, and has no prefix.
        Raises UserError for given positions of another shape.
        """
        ids, config = ctx.input_ids, self.config
        if ctx.positions_given and ctx.positions.ndim != 3:
            raise UserError(
                f"position_ids: expected (batch, 2, length) for ChatGLM-6B, got {tuple(ctx.positions.shape)}"
            )
        records, count = _records(ctx)
        place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        begin = _first(torch.ones_like(ids, dtype=torch.bool), place, records, count)
        sop, mask, gmask = (
            _first(ids == token, place, records, count)
            for token in (config.sop_token_id, config.mask_token_id, config.gmask_token_id)
        )
        absent = ids.shape[1]
        sop = torch.where(sop == absent, begin, sop)
        masked = torch.where(gmask == absent, mask, gmask)
        masked = torch.where(masked == absent, begin, masked)
        answer = place >= sop
        made = replace(ctx, prefix=~answer)
        if not ctx.positions_given:
            first = torch.where(answer, masked, place) - begin
            second = torch.where(answer, place - sop + 1, 0)
            made = replace(made, positions=torch.stack((first, second), 1))
        return made

    def next_positions(self, positions: Tensor) -> Tensor:
        """The same place, one further in the answer."""
        return positions[..., -1:] + torch.arange(2, device=positions.device).unsqueeze(1)


def _records(ctx: Context) -> tuple[Tensor, int]:
    """A number below the returned one for the record of each position, (B, S); padding is one of its own."""
    if ctx.segments is not None:
        return ctx.segments, ctx.input_ids.shape[1] + 1
    if ctx.attention_mask is not None:
        return ctx.attention_mask.long(), 2
    return torch.zeros_like(ctx.input_ids), 1


def _first(found: Tensor, place: Tensor, records: Tensor, count: int) -> Tensor:
    """The first place in each position's record where `found` is true; the length of the row without any."""
    absent = place.shape[1]
    table = place.new_full((len(place), count), absent)
    places = torch.where(found, place, absent)
    return table.scatter_reduce(1, records, places, "amin").gather(1, records)


class ChatGLMProvider(DecoderProvider):
    """What the engine knows of ChatGLM-6B (https://github.com/THUDM/ChatGLM-6B)."""

    model_class = ChatGLMForCausalLM

    def read_config(self, hf_config: Mapping[str, Any]) -> ChatGLMConfig:
        """Raises ConfigError for an unknown key, for quantised and for prefix-tuned checkpoints."""
        config = ConfigReader(hf_config, "ChatGLM-6B: ")
        config.refuse_unknown(_KEYS, _ONLY)
        hidden, heads = config.integer("hidden_size", 4096), config.integer("num_attention_heads", 32)
        if hidden % (4 * heads):
            raise ConfigError(
                f"ChatGLM-6B: hidden_size {hidden} is no multiple of 4 * num_attention_heads ({4 * heads})"
            )
        return ChatGLMConfig(
            vocab_size=config.integer("vocab_size", 150528),
            hidden_size=hidden,
            intermediate_size=config.integer("inner_hidden_size", 16384),
            num_layers=config.integer("num_layers", 28),
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=hidden // heads,
            rotary=Rotary2D(hidden // heads, scaling=HalfPrecision()),
            norm="layer",
            norm_eps=config.number("layernorm_epsilon", 1e-5),
            activation="gelu_tanh",
            gated_mlp=False,
            qkv_bias=True,
            attention_output_bias=True,
            mlp_bias=True,
            residual="normed",
            residual_scale=_ALPHA,
            tie_embeddings=config.flag("tie_word_embeddings", True),
            initializer_range=config.number("initializer_range", 0.02),
            eos_token_id=config.tokens("eos_token_id", 150005),
            pad_token_id=config.token("pad_token_id", 0),
            sop_token_id=config.integer("bos_token_id", 150004),
            mask_token_id=config.integer("mask_token_id", 150000),
            gmask_token_id=config.integer("gmask_token_id", 150001),
        )

    def weight_map(self, config: ChatGLMConfig) -> Sequence[WeightRule]:
        """query_key_value holds, for each head, its query, key and value; a tied head is stored as well."""
        return list(_rules(config))

    def tokenizer(self, path: Path) -> Any:
        """The tokenizer in a folder; see `collie_models.chatglm.tokenizer_v1`."""
        from collie_models.chatglm.tokenizer_v1 import load_tokenizer

        return load_tokenizer(path)


def _rules(config: ChatGLMConfig) -> Iterator[WeightRule]:
    names = {
        "input_layernorm": "attention_norm",
        "attention.dense": "attention.o_proj",
        "post_attention_layernorm": "mlp_norm",
        "mlp.dense_h_to_4h": "mlp.up_proj",
        "mlp.dense_4h_to_h": "mlp.down_proj",
    }
    yield Rename("transformer.word_embeddings.weight", "embed.tokens.weight")
    for index in range(config.num_layers):
        source, target = f"transformer.layers.{index}", f"blocks.{index}"
        for kind in ("weight", "bias"):
            parts = tuple(f"{target}.attention.{name}_proj.{kind}" for name in "qkv")
            sizes = (config.head_dim,) * 3
            yield Split(f"{source}.attention.query_key_value.{kind}", parts, sizes, config.num_heads)
            for theirs, ours in names.items():
                yield Rename(f"{source}.{theirs}.{kind}", f"{target}.{ours}.{kind}")
        yield Ignore(f"{source}.attention.rotary_emb.inv_freq")
    for kind in ("weight", "bias"):
        yield Rename(f"transformer.final_layernorm.{kind}", f"head.norm.{kind}")
    yield Rename("lm_head.weight", "head.lm_head.weight", stored_twice=True)
