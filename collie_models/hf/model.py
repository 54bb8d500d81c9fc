"""A model of transformers, its own modules in other rooms: embedding, blocks and head.

The library's code runs unchanged.  Around each part stands a shallow copy of the stock module that holds it
(a shell), in which stand-ins take the places of the other parts and hand the hidden states through.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from collie_core.plugin import CausalLM
from collie_models.hf.anatomy import Anatomy, bound, first
from collie_models.hf.attention import BatchVisibility

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from collie_core.ops import Context, Ops
    from collie_core.ops.attention import Attention

_ARGUMENTS = "hf.layer_arguments"


class _PassingLayer(nn.Module):
    """In the place of a layer: gives back its input, and keeps the other arguments until they are taken."""

    def __init__(self, layer: nn.Module, gives_tuple: bool) -> None:
        super().__init__()
        self._kind, self._gives_tuple = type(layer), gives_tuple
        self._arguments: dict[str, Any] = {}
        for name, value in vars(layer).items():  # what a stack may ask of it, as Gemma 2's `attention_type`
            if not name.startswith("_") and name != "training" and isinstance(value, str | int | float):
                setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        arguments = bound(self._kind, args, kwargs)
        hidden = arguments.pop(next(iter(arguments)))
        self._arguments = arguments
        return (hidden,) if self._gives_tuple else hidden

    def take(self) -> dict[str, Any]:
        """The arguments of the last call, which are then forgotten."""
        taken, self._arguments = self._arguments, {}
        return taken


class _PassingStack(nn.Module):
    """In the place of the whole stack: what goes in as embeddings comes out as hidden states."""

    def __init__(self, stack: nn.Module) -> None:
        super().__init__()
        self._kind = type(stack)

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPastAndCrossAttentions:
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=bound(self._kind, args, kwargs)["inputs_embeds"]
        )


class _Nothing(nn.Module):
    """In the place of what has parameters, where only what does not depend on them is wanted."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for name in ("weight", "padding_idx"):
            setattr(self, name, None)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        like = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        return torch.zeros((), device=like.device)


class Embed(nn.Module):
    """The stack up to its first layer."""

    def __init__(self, stack: nn.Module, anatomy: Anatomy) -> None:
        super().__init__()
        self.groups = anatomy.groups
        self.stock, self._layers = _front(stack, anatomy, {})

    def forward(self, input_ids: Tensor, ctx: Context) -> Tensor:
        """input_ids (B, S) -> (B, S, E)."""
        out = self.stock(input_ids=input_ids, position_ids=ctx.positions, use_cache=False)
        ctx.memo(_ARGUMENTS, lambda: _taken(self._layers, self.groups))
        h: Tensor = first(out)
        return h


class Preamble(nn.Module):
    """What the stack hands to its layers beside the hidden states; it has no parameters."""

    def __init__(self, stack: nn.Module, anatomy: Anatomy) -> None:
        super().__init__()
        self.groups = anatomy.groups
        weighty = {
            name: _Nothing(child)
            for name, child in stack.named_children()
            if name != anatomy.layers and name not in anatomy.after and any(True for _ in child.parameters())
        }
        self.stock, self._layers = _front(stack, anatomy, weighty)

    def forward(self, h: Tensor, ctx: Context) -> list[dict[str, Any]]:
        """Arguments of each group of layers, made once a forward pass; h is (B, S, E)."""
        return ctx.memo(_ARGUMENTS, lambda: self._make(h, ctx))

    @torch.no_grad()
    def _make(self, h: Tensor, ctx: Context) -> list[dict[str, Any]]:
        self.stock(inputs_embeds=h, position_ids=ctx.positions, use_cache=False)
        return _taken(self._layers, self.groups)


class Block(nn.Module):
    """A layer, as the library has it, with attention by `ops.attention`."""

    def __init__(self, layer: nn.Module, group: int, preamble: Preamble, attend: Attention) -> None:
        super().__init__()
        self.layer, self.preamble = layer, preamble
        self.group, self.attend = group, attend

    def forward(self, h: Tensor, ctx: Context) -> Tensor:
        """h (B, S, E) -> (B, S, E)."""
        arguments = dict(self.preamble(h, ctx)[self.group])
        arguments["attention_mask"] = BatchVisibility(self.attend, ctx)
        out: Tensor = first(self.layer(h, **arguments))
        return out


class Head(nn.Module):
    """What follows the last layer in the stack, and what follows the stack in the model."""

    def __init__(self, model: nn.Module, anatomy: Anatomy) -> None:
        super().__init__()
        stack = model.get_submodule(anatomy.stack)
        self.after = nn.ModuleDict({name: stack.get_submodule(name) for name in anatomy.after})
        self.stock = _shell(model, {anatomy.stack: _PassingStack(stack)})

    def forward(self, h: Tensor, ctx: Context) -> Tensor:
        """h (..., E) -> logits (..., V)."""
        flat = h.ndim == 2
        h = h.unsqueeze(0) if flat else h
        for module in self.after.values():
            h = module(h)
        logits: Tensor = self.stock(inputs_embeds=h, use_cache=False).logits
        return logits.squeeze(0) if flat else logits


class TransformersForCausalLM(CausalLM):
    """Any causal language model of transformers.

    Parameters keep their names within the layer, the embedding and the head: `blocks.0.layer.mlp...`,
    `embed.stock.embed_tokens.weight`, `head.after.norm.weight`, `head.stock.lm_head.weight`.
    """

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, ops: Ops) -> None:
        super().__init__()
        stack = model.get_submodule(anatomy.stack)
        preamble = Preamble(stack, anatomy)
        self.embed = Embed(stack, anatomy)
        layers = stack.get_submodule(anatomy.layers).children()
        self.blocks = nn.ModuleDict(
            {
                str(index): Block(layer, group, preamble, ops.attention)
                for index, (layer, group) in enumerate(zip(layers, anatomy.groups, strict=True))
            }
        )
        self.head = Head(model, anatomy)
        bare = copy.copy(model)  # a stage of a pipeline has no head or no embedding, but buffers
        bare._modules = {}
        self._initialise = bare._init_weights
        self.eval()  # as the library hands out its models: no dropout until training asks for it

    @torch.no_grad()
    def reset_buffers(self, device: torch.device) -> None:
        """Make rotary frequencies and the like, by the library's own initialisation."""
        for module in self.modules():
            empty = {name: b for name, b in module.named_buffers(recurse=False) if b.is_meta}
            for name, buffer in empty.items():
                setattr(module, name, torch.empty_like(buffer, device=device))
            if not empty:
                continue
            parameters = list(module.parameters(recurse=False))
            for parameter in parameters:  # the flag by which the library knows what it must not fill anew
                parameter._is_hf_initialized = True  # type: ignore[attr-defined]
            self._initialise(module)
            for parameter in parameters:
                del parameter._is_hf_initialized  # type: ignore[attr-defined]


def _front(
    stack: nn.Module, anatomy: Anatomy, replaced: Mapping[str, nn.Module]
) -> tuple[nn.Module, list[_PassingLayer]]:
    """The stack without its layers and what follows them, and the stand-ins of the layers."""
    layers = [
        _PassingLayer(layer, anatomy.gives_tuple) for layer in stack.get_submodule(anatomy.layers).children()
    ]
    others = {name: nn.Identity() for name in anatomy.after} | dict(replaced)
    return _shell(stack, {anatomy.layers: nn.ModuleList(layers), **others}), layers


def _shell(module: nn.Module, replaced: Mapping[str, nn.Module]) -> nn.Module:
    """A shallow copy with other children at the given paths; all else is shared with the original."""
    made = copy.copy(module)
    made._modules = dict(module._modules)
    for path, child in replaced.items():
        name, _, rest = path.partition(".")
        made._modules[name] = _shell(module.get_submodule(name), {rest: child}) if rest else child
    return made


def _taken(layers: list[_PassingLayer], groups: tuple[int, ...]) -> list[dict[str, Any]]:
    """The arguments of each group, from the first layer of it."""
    taken: dict[int, dict[str, Any]] = {}
    for layer, group in zip(layers, groups, strict=True):
        taken.setdefault(group, layer.take())
    return [taken[group] for group in sorted(taken)]
