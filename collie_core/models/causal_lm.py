"""The base class of causal language models: what a user calls, over the three parts that the engine runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from collie_core.errors import ConfigError, UserError
from collie_core.models.forward import (
    model_context,
    require_shape,
    require_weights,
    run_blocks,
    summed_loss,
    with_virtual_tokens,
)
from collie_core.models.generation import generate
from collie_core.models.loading import Slots
from collie_core.models.packed import unpack_linears
from collie_core.ops import Context

if TYPE_CHECKING:
    from collie_core.config.schema import CollieConfig
    from collie_core.hookspecs import Adapter, ModelProvider

__all__ = ["CausalLM", "CausalLMOutput", "Origin", "run_blocks", "summed_loss"]


@dataclass
class CausalLMOutput:
    """logits (B, S, V); loss, the mean over targets (0-d, fp32), where labels were given."""

    logits: Tensor
    loss: Tensor | None = None


@dataclass
class Origin:
    """Where a model comes from, for saving it: its provider, configs and folder (None: random weights)."""

    provider: ModelProvider
    config: Any
    hf_config: dict[str, Any]
    path: Path | None


class CausalLM(nn.Module):
    """A causal language model with children `embed`, `blocks` and `head` (see `ModelProvider.build`).

    adapters: which adapter added which parameter; empty once they are merged.
    virtual_tokens: of an adapter, before every record; what is given and returned is without them.
    max_positions: the number of positions beyond which the model computes nothing; None: there is no end.
    """

    embed: nn.Module
    blocks: nn.ModuleDict
    head: nn.Module
    origin: Origin | None = None
    adapters: Mapping[str, Adapter] = MappingProxyType({})
    virtual_tokens: int = 0
    max_positions: int | None = None

    generate = generate

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> CausalLMOutput:
        """Logits of every position, and the loss where labels are given.

        input_ids: int64 (B, S).  attention_mask: (B, S), 1 for a token.  position_ids: (B, S), counted over
        the whole row if absent.  labels: (B, S), -100 where no loss is wanted; shifted here.
        """
        require_weights(self)
        require_shape("attention_mask", attention_mask, input_ids)
        require_shape("labels", labels, input_ids)
        if self.virtual_tokens and position_ids is not None:
            raise UserError("position_ids cannot be given to a model with virtual tokens, which come first")
        ids, attention_mask = with_virtual_tokens(self, input_ids, attention_mask)
        ctx = model_context(self, Context.build(ids, attention_mask, position_ids))
        logits: Tensor = self.head(run_blocks(self, ids, ctx)[:, self.virtual_tokens :], ctx)
        if labels is None:
            return CausalLMOutput(logits)
        targets = labels[:, 1:].to(logits.device).flatten()
        return CausalLMOutput(logits, F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets))

    def prepare_context(self, ctx: Context) -> Context:
        """The context as the blocks want it, derived from the ids; called once before each forward pass of
        whole rows, on stages without `embed` too.  It must not wait for the device."""
        return ctx

    def next_positions(self, positions: Tensor) -> Tensor:
        """Positions (..., 1) of the token that is generated after those at `positions` (..., S)."""
        return positions[..., -1:] + 1

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: torch.dtype | None = None,
        use_flash: bool | Literal["auto"] | None = None,
        config: CollieConfig | None = None,
        provider: str | None = None,
        revision: str | None = None,
    ) -> Self:
        """The model in a folder or hub repository; see `AutoModelForCausalLM.from_pretrained`.

        Raises ConfigError where the checkpoint is of another family.
        """
        from collie_core.models.auto import AutoModelForCausalLM

        return cls._checked(
            AutoModelForCausalLM.from_pretrained(path, dtype, use_flash, config, provider, revision),
            str(path),
        )

    @classmethod
    def from_config(
        cls, hf_config: Mapping[str, Any], dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> Self:
        """A model with random weights; see `AutoModelForCausalLM.from_config`."""
        from collie_core.models.auto import AutoModelForCausalLM

        return cls._checked(AutoModelForCausalLM.from_config(hf_config, dtype, seed), "the config")

    @classmethod
    def _checked(cls, model: CausalLM, where: str) -> Self:
        if not isinstance(model, cls):
            raise ConfigError(f"{where} describes a {type(model).__name__}, not a {cls.__name__}")
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and weights (safetensors) in the family's original layout.

        Files of an earlier save are replaced; the folder never holds parts of both.
        A model with adapters that are not merged writes these alone, in the layout of their library.
        """
        from collie_core.models.export import export_pretrained

        require_weights(self)
        if self.adapters:
            from collie_core.models.adapters import save_adapters

            added = {name: self.get_parameter(name).detach() for name in self.adapters}
            return save_adapters(Path(folder), self.adapters, added, getattr(self, "base_sections", ()))
        origin = self._require_origin("save_pretrained")
        slots = Slots(self)
        tensors = {name: t.detach() for name, t in slots.tensors.items() if name not in slots.copies}
        export_pretrained(
            Path(folder),
            origin.provider,
            origin.config,
            origin.hf_config,
            tensors.items(),
            source=origin.path,
            dtypes={name: tensor.dtype for name, tensor in tensors.items()},
            replace=True,
        )

    def merge_adapters(self) -> None:
        """Fold every adapter into the weights that it adapts; the model is then a plain one.

        Raises UserError for a kind of adapter that no weights can hold.
        """
        unpack_linears(self)
        for adapter in dict.fromkeys(self.adapters.values()):
            adapter.merge(self)
        self.adapters = {}

    def resize_token_embeddings(self, size: int) -> None:
        """Make the vocabulary `size` tokens: rows are cut off, or added as the mean of the old ones.

        The rows are those of the parameters that the parallel plan calls embedding and head.
        Raises UserError where it names none.
        """
        from collie_core.models.resize import resize_vocabulary

        require_weights(self)
        resize_vocabulary(self, self._require_origin("resize_token_embeddings"), size)

    def _require_origin(self, action: str) -> Origin:
        if self.origin is None:
            raise UserError(f"{action} needs a model made by from_pretrained or from_config")
        return self.origin


def adopt(module: nn.Module) -> CausalLM:
    """A module of any class with the methods of `CausalLM`; it keeps its class's name, for messages."""
    if isinstance(module, CausalLM):
        return module
    return type(type(module).__name__, (_Adopted,), {})(module)


class _Adopted(CausalLM):
    """Shares the registries of a module: parameters keep their names, and both see later changes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._modules, self._parameters, self._buffers = module._modules, module._parameters, module._buffers
        self._non_persistent_buffers_set = module._non_persistent_buffers_set
        for name in ("reset_buffers", "prepare_context", "next_positions", "max_positions"):
            own = getattr(module, name, None)
            if own is not None:
                setattr(self, name, own)
