"""The engine's view of a model: embed, blocks, head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from collie_core.errors import UserError
from collie_core.ops import Context, KVCache

if TYPE_CHECKING:
    from collie_core.ops import Ops


class Parts(Protocol):
    """A module with the three children that every model has."""

    embed: nn.Module
    blocks: nn.ModuleDict
    head: nn.Module


def parts(model: nn.Module) -> Parts:
    """`model`, seen as the three parts that it must have.  Raises TypeError where one is missing."""
    for name in ("embed", "blocks", "head"):
        if not isinstance(getattr(model, name, None), nn.Module):
            raise TypeError(f"{type(model).__name__} has no child module {name!r}")
    return cast(Parts, model)


def require_weights(model: nn.Module) -> None:
    """Raise UserError where the weights are not loaded yet."""
    if next(model.parameters()).is_meta:
        origin = getattr(model, "origin", None)
        where = f" of {origin.path}" if origin is not None and origin.path else ""
        raise UserError(
            f"the weights{where} are not loaded: with dp_size, tp_size or pp_size above 1 the Trainer loads "
            "each process's part; pass the model to it, or load it with sizes of 1"
        )


def require_shape(name: str, given: Tensor | None, input_ids: Tensor) -> None:
    """Raise UserError where something is given for each id that has another shape than the ids."""
    if given is not None and given.shape != input_ids.shape:
        shape, wanted = tuple(given.shape), tuple(input_ids.shape)
        raise UserError(f"{name}: expected the shape of input_ids, {wanted}, got {shape}")


def model_context(model: nn.Module, ctx: Context) -> Context:
    """What `model` makes of the context of a batch by its own `prepare_context`, where it has one."""
    prepare = getattr(model, "prepare_context", None)
    return ctx if prepare is None else cast(Context, prepare(ctx))


def with_virtual_tokens(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """input_ids (B, S) and attention_mask with the virtual tokens that an adapter puts before every record.

    They have ids of their own, -1, -2, ..., which the embedding knows.  Of a module without any: as given.
    """
    count = getattr(model, "virtual_tokens", 0)
    if not count:
        return input_ids, attention_mask
    virtual = -1 - torch.arange(count, device=input_ids.device)
    if attention_mask is not None:
        attention_mask = F.pad(attention_mask.to(torch.int64), (count, 0), value=1)
    return torch.cat([virtual.expand(len(input_ids), -1), input_ids], 1), attention_mask


def run_blocks(model: nn.Module, input_ids: Tensor, ctx: Context, cache: KVCache | None = None) -> Tensor:
    """Embedding and all blocks: input_ids (B, S) -> (B, S, E).  `cache` is filled where it is given."""
    model_parts = parts(model)
    h: Tensor = model_parts.embed(input_ids, ctx)
    for name, block in model_parts.blocks.items():
        h = block(h, ctx if cache is None else ctx.with_cache(cache.layers[name]))
    return h


def summed_loss(model: nn.Module, h: Tensor, labels: Tensor, ctx: Context, ops: Ops) -> Tensor:
    """Cross entropy of the last block's output with the next labels, summed over targets: 0-d fp32."""
    return ops.linear_cross_entropy(parts(model).head, h, labels, ctx)
