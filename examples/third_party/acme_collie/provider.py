"""What CoLLiE must know of Acme's model: its config, its weights' names, its parallel plan, its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collie_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from torch import nn

    from acme_collie.model import AcmeConfig
    from collie_core.plugin import Ops, ParallelPlan, Relative, WeightRule


class Acme:
    """Acme's decoder, for checkpoints of model_type `acme`."""

    collie_api = 1

    @hookimpl
    def collie_model_provider(self) -> AcmeProvider:
        """The provider; it needs nothing of the checkpoint or the run."""
        return AcmeProvider()


class AcmeProvider:
    """See `collie_core.hookspecs.ModelProvider`."""

    template: str | None = None
    export_as: Mapping[str, Relative] = {}

    def read_config(self, hf_config: Mapping[str, Any]) -> AcmeConfig:
        """From the mapping in config.json."""
        from acme_collie.model import AcmeConfig
        from collie_core.plugin import ConfigError

        if hf_config.get("activation", "relu2") != "relu2":
            raise ConfigError(f"acme: activation {hf_config['activation']!r} is not supported, only relu2 is")
        names = ("vocab_size", "width", "depth", "heads", "max_positions")
        return AcmeConfig(**{name: hf_config[name] for name in names})

    def build(self, config: AcmeConfig, ops: Ops) -> nn.Module:
        """The whole module; the caller chooses the device (meta, so nothing is allocated)."""
        from acme_collie.model import AcmeDecoder

        return AcmeDecoder(config, ops)

    def weight_map(self, config: AcmeConfig) -> Sequence[WeightRule]:
        """The checkpoint holds q, k and v in one tensor and the MLP's matrices transposed."""
        from collie_core.plugin import Rename, Split, Transpose

        rules: list[WeightRule] = [
            Rename("wte", "embed.tokens.weight"),
            Rename("wpe", "embed.positions.weight"),
            Rename("ln.weight", "head.norm.weight"),
            Rename("ln.bias", "head.norm.bias"),
        ]
        width, head_width = config.width, config.width // config.heads
        for index in range(config.depth):
            ours, theirs = f"blocks.{index}", f"layers.{index}"
            for kind in ("weight", "bias"):
                parts = tuple(f"{ours}.{name}_proj.{kind}" for name in "qkv")
                rules += [
                    Split(f"{theirs}.qkv.{kind}", parts, (width, head_width, head_width)),
                    Rename(f"{theirs}.out.{kind}", f"{ours}.o_proj.{kind}"),
                    Rename(f"{theirs}.ln1.{kind}", f"{ours}.attention_norm.{kind}"),
                    Rename(f"{theirs}.ln2.{kind}", f"{ours}.mlp_norm.{kind}"),
                ]
            for name in ("up", "down"):
                rules.append(Transpose(f"{theirs}.{name}.weight", f"{ours}.{name}_proj.weight"))
                rules.append(Rename(f"{theirs}.{name}.bias", f"{ours}.{name}_proj.bias"))
        return rules

    def parallel_plan(self, config: AcmeConfig) -> ParallelPlan:
        """Keys and values have one head, which every rank keeps."""
        from collie_core.plugin import ParallelPlan

        return ParallelPlan(
            columns=("blocks.*.q_proj.*", "blocks.*.up_proj.*"),
            rows=("blocks.*.o_proj.*", "blocks.*.down_proj.*"),
            embedding=("embed.tokens.weight",),
            tied=(("embed.tokens.weight", "head.weight"),),
        )

    def tokenizer(self, path: Path) -> Any:
        """The fast tokenizer in `tokenizer.json`."""
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(path)
