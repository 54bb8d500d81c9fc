"""How a checkpoint's tensors become a module's parameters, and back.

A provider returns a list of rules.  `source` is always a name in the checkpoint, `target` the name of a
parameter of the module.  Every rule has an exact inverse: `save(load(x)) == x`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class WeightRule(Protocol):
    """A group of checkpoint tensors and the parameters that they hold."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Names in the checkpoint; empty for `Ignore`."""

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of parameters."""

    def load(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters by name, from the source tensors by name.  Raises ValueError for impossible shapes."""

    def save(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Checkpoint tensors by name, from the parameters by name: the inverse of `load`."""


@dataclass(frozen=True)
class Rename:
    """One tensor under another name.

    stored_twice: where the target is tied to another parameter, its own tensor is written all the same.
    """

    source: str
    target: str
    stored_twice: bool = False

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,)

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.target,)

    def load(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {self.target: tensors[self.source]}

    def save(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {self.source: tensors[self.target]}


@dataclass(frozen=True)
class Transpose:
    """A matrix that the checkpoint holds transposed, as GPT-2's `Conv1D` does."""

    source: str
    target: str

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,)

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.target,)

    def load(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {self.target: tensors[self.source].t()}

    def save(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {self.source: tensors[self.target].t()}


@dataclass(frozen=True)
class Split:
    """One tensor that holds several parameters, cut along its first dimension.

    That dimension is `groups` blocks of `sum(sizes)` rows; parameter k takes its `sizes[k]` rows of every
    block.  groups=1: [Q; K; V] one after the other.  groups=heads: [q, k, v] of each head in turn.
    """

    source: str
    targets: tuple[str, ...]
    sizes: tuple[int, ...]
    groups: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        object.__setattr__(self, "sizes", tuple(self.sizes))
        if len(self.targets) != len(self.sizes):
            raise ValueError(f"Split of {self.source!r}: {len(self.targets)} targets but {self.sizes}")

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,)

    def load(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        whole = tensors[self.source]
        rows = self.groups * sum(self.sizes)
        if whole.shape[0] != rows:
            raise ValueError(f"expected {rows} rows, found shape {tuple(whole.shape)}")
        blocks = whole.unflatten(0, (self.groups, sum(self.sizes)))
        parts = blocks.split(list(self.sizes), dim=1)
        return {name: part.flatten(0, 1) for name, part in zip(self.targets, parts, strict=True)}

    def save(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        import torch

        parts = [tensors[name].unflatten(0, (self.groups, -1)) for name in self.targets]
        return {self.source: torch.cat(parts, dim=1).flatten(0, 1)}


@dataclass(frozen=True)
class Merge:
    """Several tensors, one below the other, that make one parameter; `sizes` are their rows."""

    sources: tuple[str, ...]
    target: str
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", tuple(self.sources))
        object.__setattr__(self, "sizes", tuple(self.sizes))
        if len(self.sources) != len(self.sizes):
            raise ValueError(f"Merge to {self.target!r}: {len(self.sources)} sources but {self.sizes}")

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.target,)

    def load(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        import torch

        found = tuple(tensors[name].shape[0] for name in self.sources)
        if found != self.sizes:
            raise ValueError(f"expected {self.sizes} rows, found {found}")
        return {self.target: torch.cat([tensors[name] for name in self.sources])}

    def save(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        parts = tensors[self.target].split(list(self.sizes))
        return dict(zip(self.sources, parts, strict=True))


@dataclass(frozen=True)
class Ignore:
    """Checkpoint tensors that carry nothing, by a pattern as in a shell; they are never written."""

    pattern: str

    @property
    def sources(self) -> tuple[str, ...]:
        return ()

    @property
    def targets(self) -> tuple[str, ...]:
        return ()

    def load(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {}

    def save(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {}


@dataclass(frozen=True)
class ParallelPlan:
    """How parameters are cut under tensor parallelism, by name patterns (`blocks.*.mlp.up_proj.weight`).

    columns: cut along the output (dim 0), bias too.  rows: cut along the input (dim 1 of the weight); their
    bias is whole.  embedding and head: cut along the vocabulary.  Everything else is replicated.
    tied: (name, name) of parameters that are one.  heads, kv_heads: numbers of query heads and of key-value
    heads, which bound the cut.  keys_values: those of `columns` that make keys and values, which are
    repeated where there are fewer key-value heads than ranks.  partial: replicated parameters that work on a
    part of the heads on each rank, so that their gradients are partial sums (norms of queries and keys).
    whole: what other patterns name and is replicated all the same.  sequence: the blocks may be given a part
    of the sequence; false where more than attention looks along it.
    """

    columns: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    embedding: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    tied: tuple[tuple[str, str], ...] = ()
    kv_heads: int | None = None
    heads: int | None = None
    keys_values: tuple[str, ...] = ()
    partial: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    sequence: bool = True


@dataclass(frozen=True)
class Relative:
    """A family that transformers implements natively and that can hold the same weights.

    config(hf_config) is the relative's `config.json`; weight_map(config), given the provider's own config,
    are the rules between the relative's checkpoint and our parameters.
    """

    config: Callable[[Mapping[str, Any]], dict[str, Any]]
    weight_map: Callable[[Any], Sequence[WeightRule]]
