"""The decoder: embedding, blocks and head, as the engine runs them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from collie_core.plugin import CausalLM
from collie_models.decoder.blocks import ParallelBlock, SequentialBlock
from collie_models.decoder.config import DecoderConfig
from collie_models.decoder.layers import make_norm

if TYPE_CHECKING:
    from collie_core.ops import Context, Ops


class Embedding(nn.Module):
    """Token embeddings."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.rotary = config.rotary
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)

    def forward(self, input_ids: Tensor, ctx: Context) -> Tensor:
        """input_ids (B, S) -> (B, S, E)."""
        self.rotary.angles(ctx)  # memoised here, outside the blocks, so that all blocks compile to one graph
        out: Tensor = self.tokens(input_ids)
        return out


class Head(nn.Module):
    """The last norm and the projection to the vocabulary."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.norm = make_norm(config)
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
        block = SequentialBlock if config.residual == "sequential" else ParallelBlock
        self.embed = Embedding(config)
        self.blocks = nn.ModuleDict({str(index): block(config, ops) for index in range(config.num_layers)})
        self.head = Head(config)
        if config.tie_embeddings:
            self.head.lm_head.weight = self.embed.tokens.weight
