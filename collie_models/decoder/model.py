"""The decoder: embedding, blocks and head, as the engine runs them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from collie_core.errors import UserError
from collie_core.plugin import CausalLM
from collie_models.decoder.blocks import BLOCKS
from collie_models.decoder.config import DecoderConfig
from collie_models.decoder.layers import make_norm

if TYPE_CHECKING:
    from collie_core.ops import Context, Ops
    from collie_core.run import Run


class Embedding(nn.Module):
    """Token embeddings."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        values = torch.empty(config.vocab_size, config.hidden_size)
        if not values.is_meta:  # there torch imports its compiler to draw nothing: a second of every start
            nn.init.normal_(values)
        self.tokens = nn.Embedding.from_pretrained(values, freeze=False)

    def forward(self, input_ids: Tensor, ctx: Context) -> Tensor:
        """input_ids (B, S) -> (B, S, E)."""
        out: Tensor = self.tokens(input_ids)
        return out


class Head(nn.Module):
    """The last norm and the projection to the vocabulary."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.norm = make_norm(config) if config.final_norm else nn.Identity()
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)

    def forward(self, h: Tensor, ctx: Context) -> Tensor:
        """h (..., E) -> logits (..., V)."""
        out: Tensor = self.lm_head(self.norm(h))
        return out


class Decoder(CausalLM):
    """A causal language model made of the shared blocks.  It has no buffers.

    Parameters are named `embed.tokens.weight`, `blocks.N.attention.q_proj.weight`, `head.lm_head.weight`, ...
    """

    def __init__(self, config: DecoderConfig, ops: Ops) -> None:
        super().__init__()
        block = BLOCKS[config.residual]
        self.max_positions = config.max_positions
        self.rotary = config.rotary
        self.embed = Embedding(config)
        self.blocks = nn.ModuleDict({str(index): block(config, ops) for index in range(config.num_layers)})
        self.head = Head(config)
        if config.tie_embeddings:
            self.head.lm_head.weight = self.embed.tokens.weight

    def prepare_context(self, ctx: Context) -> Context:
        """Memoise the rotary angles, outside the blocks, so that all blocks compile to one graph.

        Raises UserError for rows that are longer than the model has positions; records of packed rows are
        not looked at.
        """
        length = ctx.input_ids.shape[1]
        if ctx.segments is None and self.max_positions is not None and length > self.max_positions:
            raise UserError(f"{length} tokens in a row, and the model has {self.max_positions} positions")
        self.rotary.angles(ctx)
        return ctx


def position_problems(run: Run) -> list[str]:
    """What `collie_check` says of records that may be longer than the model has positions."""
    limit = None if run.source is None else run.source.config.max_positions
    longest = run.config.data.max_length
    if limit is None or longest <= limit:
        return []
    return [f"data.max_length: {longest} is above the model's {limit} positions"]
