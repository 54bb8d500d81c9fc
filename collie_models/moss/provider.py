"""MOSS's config, weight map and tokenizer, and its relative: CodeGen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from collie_core.plugin import ConfigError, Ignore, Relative, Rename, Split, WeightRule
from collie_models.decoder.config import DecoderConfig
from collie_models.decoder.config_reader import ConfigReader
from collie_models.decoder.llama_config import ACTIVATIONS
from collie_models.decoder.model import Decoder
from collie_models.decoder.provider import DecoderProvider
from collie_models.decoder.relatives import shared_keys
from collie_models.decoder.rotary import Rotary

_BLOCKS = 4  # of the fused projection, which was trained on four devices

_KEYS = (
    *("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "rotary_dim"),
    *("activation_function", "layer_norm_epsilon", "initializer_range", "tie_word_embeddings"),
)
#: transformers' other names for the same
_ALIASES = {
    "max_position_embeddings": "n_positions",
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
#: what the original computes in no other way, or what is not computed here
_ONLY = {
    "scale_attn_weights": (True,),
    "wbits": (16, 32),
}


class MossForCausalLM(Decoder):
    """A MOSS.  `from_pretrained` reads a folder or hub repository in Hugging Face layout."""


class MossProvider(DecoderProvider):
    """What the engine knows of MOSS (https://github.com/OpenLMLab/MOSS)."""

    model_class = MossForCausalLM
    export_as: Mapping[str, Relative] = {  # CodeGen has the same names
        "codegen": Relative(
            lambda hf: as_codegen(MossProvider().read_config(hf), hf), lambda config: list(_rules(config))
        )
    }

    def read_config(self, hf_config: Mapping[str, Any]) -> DecoderConfig:
        """GPT-J's blocks.  rotary_dim null turns the whole head.  Raises ConfigError for an unknown key."""
        stated = ConfigReader(hf_config)
        stated.refuse_unknown([*_KEYS, *_ALIASES, "groupsize"], _ONLY)
        config = ConfigReader({_ALIASES.get(key, key): value for key, value in hf_config.items()})
        hidden, heads = config.integer("n_embd", 4096), config.integer("n_head", 16)
        if hidden % heads:
            raise ConfigError(f"n_embd {hidden} is no multiple of n_head {heads}")
        if heads % _BLOCKS:
            raise ConfigError(f"n_head {heads} is no multiple of {_BLOCKS}, the blocks of MOSS's qkv_proj")
        whole = hidden // heads
        rotary_dim = config.integer("rotary_dim", whole if "rotary_dim" in hf_config else min(64, whole))
        if rotary_dim % 2 or rotary_dim > whole:
            raise ConfigError(f"rotary_dim: {rotary_dim} is not an even number of at most {whole} channels")
        return DecoderConfig(
            vocab_size=config.integer("vocab_size", 107008),
            hidden_size=hidden,
            intermediate_size=config.integer("n_inner", 4 * hidden),
            num_layers=config.integer("n_layer", 28),
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=whole,
            rotary=Rotary(rotary_dim, interleaved=True),
            norm="layer",
            norm_eps=config.number("layer_norm_epsilon", 1e-5),
            activation=config.choice("activation_function", ACTIVATIONS, "gelu_new"),
            gated_mlp=False,
            mlp_bias=True,
            head_bias=True,
            residual="parallel",
            max_positions=config.integer("n_positions", 2048),
            tie_embeddings=config.flag("tie_word_embeddings", False),
            initializer_range=config.number("initializer_range", 0.02),
            eos_token_id=config.tokens("eos_token_id", 106068),
            pad_token_id=config.token("pad_token_id"),
        )

    def weight_map(self, config: DecoderConfig) -> Sequence[WeightRule]:
        """qkv_proj holds, for each of four blocks of heads, the queries, the values and the keys."""
        return list(_rules(config))

    def tokenizer(self, path: Path) -> Any:
        """The tokenizer in a folder; see `collie_models.moss.tokenizer`."""
        from collie_models.moss.tokenizer import load_tokenizer

        return load_tokenizer(path)


def _rules(config: DecoderConfig) -> Iterator[WeightRule]:
    sizes = (config.hidden_size // _BLOCKS,) * 3
    yield Rename("transformer.wte.weight", "embed.tokens.weight")
    for index in range(config.num_layers):
        source, target = f"transformer.h.{index}", f"blocks.{index}"
        parts = tuple(f"{target}.attention.{name}_proj.weight" for name in ("q", "v", "k"))
        yield Split(f"{source}.attn.qkv_proj.weight", parts, sizes, _BLOCKS)
        yield Rename(f"{source}.attn.out_proj.weight", f"{target}.attention.o_proj.weight")
        for kind in ("weight", "bias"):
            yield Rename(f"{source}.ln_1.{kind}", f"{target}.norm.{kind}")
            yield Rename(f"{source}.mlp.fc_in.{kind}", f"{target}.mlp.up_proj.{kind}")
            yield Rename(f"{source}.mlp.fc_out.{kind}", f"{target}.mlp.down_proj.{kind}")
        yield Ignore(f"{source}.attn.causal_mask")
    for kind in ("weight", "bias"):
        yield Rename(f"transformer.ln_f.{kind}", f"head.norm.{kind}")
        yield Rename(f"lm_head.{kind}", f"head.lm_head.{kind}")


def as_codegen(config: DecoderConfig, hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' CodeGenConfig."""
    made = shared_keys("codegen", "CodeGenForCausalLM", config, hf_config)
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        del made[key]
    assert isinstance(config.rotary, Rotary)
    return made | {
        "n_embd": config.hidden_size,
        "n_inner": config.intermediate_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_positions": config.max_positions,
        "n_ctx": config.max_positions,
        "rotary_dim": config.rotary.dim,
        "activation_function": hf_config.get("activation_function") or "gelu_new",
        "layer_norm_epsilon": config.norm_eps,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }
