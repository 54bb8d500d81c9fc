"""What a decoder is made of: every option of the shared blocks, whatever a family calls them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from collie_models.decoder.rotary import AnyRotary


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and choices of a decoder.

    num_kv_heads < num_heads is grouped-query attention (1: multi-query).  qk_norm: RMSNorm over the channels
    of each query and key head (Qwen3).  window: positions that a query sees, itself included; None: all.
    residual `parallel`: attention and MLP read the same norm and are added at once; `sequential`: MLP after
    attention, each with a norm of its own; `normed`: as that, but what is added to is the norm's output times
    residual_scale.  final_norm: a norm before the head.  max_positions: there are no more than these.
    late_rotation: caches hold keys before their rotation, and all turn anew when the frequencies change.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary: AnyRotary
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated_mlp: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False
    window: int | None = None
    attention_output_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    residual: Literal["sequential", "parallel", "normed"] = "sequential"
    residual_scale: float = 1.0
    final_norm: bool = True
    max_positions: int | None = None
    late_rotation: bool = False
    tie_embeddings: bool = False
    initializer_range: float = 0.02
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
