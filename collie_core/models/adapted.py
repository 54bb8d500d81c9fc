"""Linears and embeddings that adapters and other plugins change, in a form that every layout can cut.

An adapter's own parameters are children of the linear, so the model's keep their names:
`blocks.0.attention.q_proj.weight` and `blocks.0.attention.q_proj.adapters.default.lora_A`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from collie_core.errors import ConfigError, PluginError, nearest
from collie_core.models.packed import Packing, packed_product, stored_bytes

#: x (..., inputs), weight (outputs, inputs) -> (..., outputs)
Multiply = Callable[[Tensor, Tensor], Tensor]


class Delta(nn.Module):
    """What one adapter does to the product of a linear; its parameters are direct ones, of no child.

    along_outputs, along_inputs: parameter -> the dimension of it that goes with the linear's outputs, or
    inputs, and is cut where they are.  All others are whole on every rank, and their gradients are summed.
    """

    along_outputs: Mapping[str, int] = {}
    along_inputs: Mapping[str, int] = {}

    def forward(self, x: Tensor, product: Tensor, linear: AdaptedLinear) -> Tensor:
        """product (..., outputs), of x (..., inputs) with the weight and with earlier deltas -> the new one.

        Where a rank has a part of the inputs, the results of all ranks are added up afterwards: it must be
        linear in x.  `linear.sum_over_inputs` completes a sum over the inputs.
        """
        raise NotImplementedError

    def merge(self, weight: Tensor) -> Tensor:
        """The weight (outputs, inputs), fp32, whose product is what `forward` makes of this weight's."""
        raise NotImplementedError


class AdaptedLinear(nn.Linear):
    """A linear with `adapters`, deltas by the adapter's name, in order; the bias is added after them.

    packing: how its weight is stored, where that is not as numbers; `unpacked_dtype`: the one it had.
    multiply: what computes the product with the weight in training, where F.linear does not.
    """

    adapters: nn.ModuleDict
    multiply: Multiply | None = None
    packing: Packing | None = None
    unpacked_dtype: torch.dtype | None = None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False, device="meta")
        self.adapters = nn.ModuleDict()

    def product(self, x: Tensor) -> Tensor:
        """x (..., inputs) -> (..., outputs), without the bias."""
        if self.packing is not None:
            out = packed_product(x, self.weight, self.packing)
        elif self.multiply is not None and self.training:
            out = self.multiply(x, self.weight)
        else:
            out = F.linear(x, self.weight)
        for delta in self.adapters.values():
            out = delta(x, out, self)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """x (..., inputs) -> (..., outputs)."""
        plain = self.packing is None and (self.multiply is None or not self.training)
        if plain and not self.adapters:
            return F.linear(x, self.weight, self.bias)
        out = self.product(x)
        return out if self.bias is None else out + self.bias

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The weight (outputs, inputs), in `dtype`, whether it is packed or not."""
        weight = self.weight
        return weight.to(dtype) if self.packing is None else self.packing.unpack(stored_bytes(weight), dtype)

    def sum_over_inputs(self, partial: Tensor) -> Tensor:
        """A sum over the inputs that this rank has, completed over all of them."""
        return partial


class AdaptedEmbedding(nn.Embedding):
    """An embedding with `adapters`, modules by the adapter's name, each `(ids, vectors) -> vectors`.

    ids: int64 (B, S), negative at virtual tokens: -1, -2, ... for the first, the second, ...  vectors:
    (B, S, E).  The modules are whole on every rank.
    """

    adapters: nn.ModuleDict

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        values = torch.empty(num_embeddings, embedding_dim, device="meta")
        super().__init__(num_embeddings, embedding_dim, _weight=values)  # drawing none, as torch would
        self.adapters = nn.ModuleDict()

    def lookup(self, ids: Tensor) -> Tensor:
        """ids (B, S), none negative -> (B, S, E)."""
        return F.embedding(ids, self.weight, self.padding_idx)

    def forward(self, input: Tensor) -> Tensor:
        """ids (B, S) -> (B, S, E)."""
        if not self.adapters:
            return self.lookup(input)
        vectors = self.lookup(input.clamp(min=0))
        for change in self.adapters.values():
            vectors = change(input, vectors)
        return vectors


def adapt_embedding(model: nn.Module, path: str, name: str, change: nn.Module) -> None:
    """Let adapter `name` change the embedding at `path`; a `padding_idx` stays.

    Raises ConfigError where it is no plain one, or looking up a word changes more than its own vector.
    """
    embedding = model.get_submodule(path)
    if not isinstance(embedding, AdaptedEmbedding):
        _check_plain(path, embedding, nn.Embedding)
        assert isinstance(embedding, nn.Embedding)
        for key in ("max_norm", "scale_grad_by_freq", "sparse"):  # virtual tokens would count as words
            if getattr(embedding, key):
                raise ConfigError(f"{path} is an embedding with {key}, which adapters cannot change")
        plain, embedding = embedding, AdaptedEmbedding(embedding.num_embeddings, embedding.embedding_dim)
        embedding.weight, embedding.padding_idx = plain.weight, plain.padding_idx
        _put(model, path, embedding)
    embedding.adapters[name] = change


def add_delta(model: nn.Module, path: str, name: str, delta: Delta) -> None:
    """Let adapter `name` change the linear at `path`.

    Raises ConfigError where it is no plain one, PluginError where there already is an adapter of this name.
    """
    linear = adapted_linear(model, path)
    if name in linear.adapters:
        raise PluginError(f"{path} already has an adapter named {name!r}")
    linear.adapters[name] = delta


def adapted_linear(model: nn.Module, path: str) -> AdaptedLinear:
    """The linear at `path`, made one that can be adapted.  Raises ConfigError where it is no plain one."""
    linear = model.get_submodule(path)
    if isinstance(linear, AdaptedLinear):
        return linear
    _check_plain(path, linear, nn.Linear)
    assert isinstance(linear, nn.Linear)
    made = AdaptedLinear(linear.in_features, linear.out_features)
    made.weight, made.bias = linear.weight, linear.bias
    _put(model, path, made)
    return made


def block_linears(model: nn.Module, skip_modules: Sequence[str] = ()) -> list[str]:
    """Paths of the linears in the blocks but those that a name or pattern fits: o_proj, blocks.0.*.

    Raises ConfigError for one that fits none.
    """
    paths = [
        path
        for path, module in model.named_modules()
        if path.startswith("blocks.") and type(module) in (nn.Linear, AdaptedLinear)
    ]
    for pattern in skip_modules:
        if not any(fits(path, pattern) for path in paths):
            names = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
            raise ConfigError(
                f"skip_modules: {pattern!r} fits no linear of the model's blocks{nearest(pattern, names)} "
                f"(known: {', '.join(names)})"
            )
    return [path for path in paths if not any(fits(path, pattern) for pattern in skip_modules)]


def fits(path: str, pattern: str) -> bool:
    """Whether a user's name or pattern means the module at `path`."""
    return path == pattern or path.endswith(f".{pattern}") or fnmatchcase(path, pattern)


def linear_dtype(linear: nn.Linear) -> torch.dtype:
    """The dtype that a linear's new parameters have: its weight's, were it not packed."""
    return getattr(linear, "unpacked_dtype", None) or linear.weight.dtype


def merge_deltas(model: nn.Module, name: str) -> None:
    """Fold the deltas of adapter `name` into the weights; linears with no other are plain again."""
    for path, linear in list(model.named_modules()):
        if not isinstance(linear, AdaptedLinear) or name not in linear.adapters:
            continue
        delta = linear.adapters[name]
        assert isinstance(delta, Delta)
        weight = linear.weight.detach()
        merged = delta.merge(weight.float()).to(weight.dtype)
        # another tensor: the old one may be a page of a file, or tied
        linear.weight = nn.Parameter(merged, linear.weight.requires_grad)
        del linear.adapters[name]
        if not linear.adapters:
            plain = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
            plain.weight, plain.bias = linear.weight, linear.bias
            _put(model, path, plain)


def _check_plain(path: str, module: nn.Module, kind: type[nn.Module]) -> None:
    """What a subclass computes would be lost."""
    if type(module) is not kind:
        raise ConfigError(f"{path} is a {type(module).__name__}, which adapters cannot change")


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    owner, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)
