"""Prefix tuning: trained keys and values in the places of the virtual tokens, in every block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from collie_core.plugin import (
    AdaptedLinear,
    CheckpointError,
    ConfigError,
    Context,
    Delta,
    Piece,
    UserError,
    adapt_embedding,
    add_delta,
    block_linears,
    linear_dtype,
)
from collie_methods.lora.files import base_model, write_folder
from collie_methods.lora.prompt_plugins import PrefixTuningOptions
from collie_methods.lora.prompts import EMBEDDINGS, read_embeddings, word_embedding
from collie_methods.lora.values import generator

if TYPE_CHECKING:
    from collie_core.ops.cache import LayerCache
    from collie_core.run import Run
    from collie_core.shard import Shard

_PROJECTIONS = ("k_proj", "v_proj")


class Prefix(Delta):
    """Holds keys or values (P, heads x width) beside the linear whose outputs they stand beside; its product
    stays as it is."""

    along_outputs = {"prefix": 1}

    def __init__(self, count: int, linear: nn.Linear) -> None:
        super().__init__()
        device, dtype = linear.weight.device, linear_dtype(linear)
        self.prefix = nn.Parameter(torch.empty(count, linear.out_features, device=device, dtype=dtype))

    def forward(self, x: Tensor, product: Tensor, linear: AdaptedLinear) -> Tensor:
        """The product."""
        return product

    def merge(self, weight: Tensor) -> Tensor:
        """Raises UserError: no weight can hold a prefix."""
        raise UserError("prefix_tuning cannot be merged: keys and values of virtual tokens are no weights")

    def put(self, heads: Tensor, ids: Tensor) -> Tensor:
        """heads (B, H, S, D), with the prefix at the virtual tokens among `ids` (B, S)."""
        own = F.embedding((-1 - ids).clamp(min=0), self.prefix).unflatten(-1, (-1, heads.shape[-1]))
        return torch.where((ids < 0)[:, None, :, None], own.transpose(1, 2), heads)


class _AnyVectors(nn.Module):
    """Of the virtual tokens: what blocks compute of them is seen by none."""

    def forward(self, ids: Tensor, vectors: Tensor) -> Tensor:
        return vectors


@dataclass
class PrefixCache:
    """In the place of a layer's cache, or of none: what attention appends has the prefix in it."""

    keys: Prefix
    values: Prefix
    ids: Tensor
    inner: LayerCache | None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """As `LayerCache.append`."""
        keys, values = self.keys.put(keys, self.ids), self.values.put(values, self.ids)
        return (keys, values) if self.inner is None else self.inner.append(keys, values)


def _with_prefix(keys: Prefix, values: Prefix) -> Any:
    """A hook of a block: it sees the context with the prefix."""

    def hook(block: nn.Module, args: tuple[Tensor, Context]) -> tuple[Tensor, Context]:
        h, ctx = args
        cache: Any = PrefixCache(keys, values, ctx.input_ids, ctx.cache)
        return h, replace(ctx, cache=cache)

    return hook


def _linear(model: nn.Module, path: str) -> nn.Linear:
    found = model.get_submodule(path)
    assert isinstance(found, nn.Linear)
    return found


class PrefixAdapter:
    """One entry of `adapters:`; see `collie_core.hookspecs.Adapter`."""

    def __init__(self, options: PrefixTuningOptions, run: Run) -> None:
        self.options, self.run, self.name = options, run, options.adapter_name
        self.pairs: list[tuple[str, str]] = []
        self._read: Tensor | None = None
        if options.path is not None:
            self.load(Path(options.path))

    # ------------------------------------------------------------ on the model
    def adapt(self, model: nn.Module) -> None:
        """A prefix beside the projections to keys and values of every block.

        Raises ConfigError where a block has no two linears of these names, CheckpointError where the folder
        of `path` is for another model.
        """
        count = self.options.num_virtual_tokens if self._read is None else len(self._read)
        known = block_linears(model)
        blocks: Any = model.blocks
        for key, block in blocks.items():
            inside = [path for path in known if path.startswith(f"blocks.{key}.")]
            pair = [path for leaf in _PROJECTIONS for path in inside if path.endswith(f".{leaf}")]
            if len(pair) != 2:
                raise ConfigError(f"blocks.{key} has no k_proj and v_proj, beside which a prefix could stand")
            self.pairs.append((pair[0], pair[1]))
            made = [Prefix(count, _linear(model, path)) for path in pair]
            for path, prefix in zip(pair, made, strict=True):
                add_delta(model, path, self.name, prefix)
            block.register_forward_pre_hook(_with_prefix(*made))
        adapt_embedding(model, word_embedding(self.run), self.name, _AnyVectors())
        model.virtual_tokens = count  # type: ignore[assignment]
        columns = sum(_linear(model, path).out_features for pair in self.pairs for path in pair)
        if self._read is not None and self._read.shape[1] != columns:
            raise CheckpointError(
                f"{self.options.path}: {EMBEDDINGS} has {self._read.shape[1]} columns, the model's keys and "
                f"values have {columns}"
            )

    def initialise(self, name: str, values: Tensor, shard: Shard) -> None:
        """From the folder of `path`, or anew."""
        if self._read is not None:
            path, width = name.partition(".adapters.")[0], shard.shape[1]
            order = [path for pair in self.pairs for path in pair]
            place = order.index(path)  # keys and values of a model are of one width
            whole = self._read[:, place * width : (place + 1) * width]
        elif self.options.init_weights == "zero":
            whole = torch.zeros(shard.shape)
        else:
            whole = torch.randn(shard.shape, generator=generator(self.run.seed, name)) * 0.02
        values.copy_(whole[Piece(values, shard.shape, shard.offsets).slices])

    def merge(self, model: nn.Module) -> None:
        """Raises UserError: no weights can hold virtual tokens."""
        raise UserError(f"adapter {self.name!r}: virtual tokens cannot be merged into weights")

    # ------------------------------------------------------------ in files
    def save(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """peft's layout: keys and values of the first block, then of the second, ..., side by side."""
        from peft import PrefixTuningConfig

        parts = [
            tensors[f"{path}.adapters.{self.name}.prefix"].cpu() for pair in self.pairs for path in pair
        ]
        source = self.run.source
        assert source is not None
        config = PrefixTuningConfig(
            task_type="CAUSAL_LM",
            base_model_name_or_path=base_model(self.run.config.model.path),
            inference_mode=True,
            num_virtual_tokens=len(parts[0]),
            token_dim=parts[0].shape[1],
            num_layers=len(self.pairs),
            num_attention_heads=source.provider.parallel_plan(source.config).kv_heads,
            num_transformer_submodules=1,
            encoder_hidden_size=parts[0].shape[1],
        )
        write_folder(folder, config, {EMBEDDINGS: torch.cat(parts, 1)})

    def load(self, folder: Path) -> None:
        """Keys and values of a folder in peft's layout.  Raises CheckpointError."""
        from peft import PrefixTuningConfig

        self._read = read_embeddings(folder, PrefixTuningConfig)[1]
