"""Attention of transformers' layers by `ops.attention`, through the library's own interface for it.

A layer hands its `attention_mask` unread to the attention function.  Ours is a `Visibility`, which knows the
batch; so packing, padding and the cache are the same as in every other model, and nothing is global.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface

from collie_core.plugin import ConfigError, Scores

if TYPE_CHECKING:
    from collie_core.ops import Context
    from collie_core.ops.attention import Attention

#: The name of the implementation, for `attn_implementation`.
NAME = "collie"

#: What layers hand on that has no bearing on the result.
_WITHOUT_EFFECT = frozenset(
    {"position_ids", "position_embeddings", "use_cache", "cache", "past_key_values", "cache_position"}
    | {"output_attentions", "output_hidden_states", "layer_idx", "is_causal", "return_dict"}
)


class Visibility(Protocol):
    """What stands in the place of an attention mask: it computes the attention of one layer."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, scores: Scores) -> Tensor:
        """q (B, H, S, D), k and v (B, H_kv, S, D) -> (B, H, S, D)."""


class BatchVisibility:
    """The visibility of a batch."""

    def __init__(self, attend: Attention, ctx: Context) -> None:
        self.attend, self.ctx = attend, ctx

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, scores: Scores) -> Tensor:
        if q.shape[2] != self.ctx.input_ids.shape[1]:
            raise ConfigError(
                "a layer of transformers got a part of the sequence; set layout.sequence_parallel: false"
            )
        return self.attend(q, k, v, self.ctx, scale, scores)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Visibility,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: (B, H, S, D) each -> ((B, S, H, D), no weights).

    Raises ConfigError for an argument that would change the result and is not computed here.
    """
    for name, given in others.items():
        if given is not None and name not in _WITHOUT_EFFECT:
            raise ConfigError(f"its attention is computed with {name}")
    if not getattr(module, "is_causal", True) or others.get("is_causal") is False:
        raise ConfigError("its attention is not causal")
    scores = Scores(sliding_window, softcap, dropout)
    return attention_mask(query, key, value, scaling, scores).transpose(1, 2), None


AttentionInterface.register(NAME, attention)
