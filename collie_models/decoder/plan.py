"""The parallel plan that every family on the shared decoder has."""

from __future__ import annotations

from collie_core.plugin import ParallelPlan
from collie_models.decoder.config import DecoderConfig


def decoder_parallel_plan(config: DecoderConfig) -> ParallelPlan:
    """The cut of any decoder made of the shared blocks: attention by heads, MLP by its inner width."""
    return ParallelPlan(
        columns=(
            "blocks.*.attention.q_proj.*",
            "blocks.*.attention.k_proj.*",
            "blocks.*.attention.v_proj.*",
            "blocks.*.mlp.gate_proj.*",
            "blocks.*.mlp.up_proj.*",
        ),
        rows=("blocks.*.attention.o_proj.*", "blocks.*.mlp.down_proj.*"),
        embedding=("embed.tokens.weight",),
        head=("head.lm_head.*",),
        tied=(("embed.tokens.weight", "head.lm_head.weight"),) if config.tie_embeddings else (),
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        keys_values=("blocks.*.attention.k_proj.*", "blocks.*.attention.v_proj.*"),
        partial=("blocks.*.attention.q_norm.weight", "blocks.*.attention.k_norm.weight")
        if config.qk_norm
        else (),
    )
