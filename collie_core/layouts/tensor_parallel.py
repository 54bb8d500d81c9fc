"""Tensor parallelism by the provider's table: linears and embeddings become their cut counterparts.

The model's own code is not touched: a module named in the plan is replaced by one of the classes below, with
the same parameter names, which holds this rank's part and talks to the others where the maths asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from collie_core.errors import ConfigError, PluginError
from collie_core.layouts.collectives import (
    Copy,
    GatherSequence,
    JoinSequence,
    Reduce,
    ReduceScatterSequence,
    SplitSequence,
)
from collie_core.models.adapted import AdaptedEmbedding, AdaptedLinear, Delta
from collie_core.models.packed import check_blocks, packed_columns

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from collie_core.layouts.grid import Axis, Grid
    from collie_core.models.weight_map import ParallelPlan
    from collie_core.shard import Shard

Kind = Literal["columns", "rows", "embedding", "head", "partial", "whole"]


class TensorParallel:
    """The ranks of one layer, and whether the activations between layers are cut along the sequence."""

    def __init__(self, axis: Axis, sequence_parallel: bool) -> None:
        assert axis.group is not None
        self.group: ProcessGroup = axis.group
        self.size, self.rank = axis.size, axis.rank
        self.sequence_parallel = sequence_parallel

    def part(self, length: int) -> tuple[int, int]:
        """(start, length) of this rank's part of `length` rows; they differ by one at most."""
        least, more = divmod(length, self.size)
        start = self.rank * least + min(self.rank, more)
        return start, least + (self.rank < more)

    def split(self, h: Tensor) -> Tensor:
        """What all ranks have whole, (B, S, E), as it goes into the blocks."""
        return SplitSequence.apply(h, self.group) if self.sequence_parallel else h

    def join(self, h: Tensor) -> Tensor:
        """What comes out of the blocks, whole again."""
        return JoinSequence.apply(h, self.group) if self.sequence_parallel else h

    @contextmanager
    def whole_sequences(self) -> Iterator[None]:
        """Without sequence parallelism: for generation, whose sequences are too short to be cut."""
        before, self.sequence_parallel = self.sequence_parallel, False
        try:
            yield
        finally:
            self.sequence_parallel = before


class _Entrance:
    """The way into column-parallel linears that read the same tensor: one collective for all of them."""

    def __init__(self, tp: TensorParallel) -> None:
        self.tp, self.users = tp, 0
        self._source: Tensor | None = None
        self._entered: Tensor | None = None
        self._left = 0

    def __call__(self, x: Tensor, cut_sequence: bool) -> Tensor:
        if self._source is not x or self._entered is None:
            kind = GatherSequence if cut_sequence and self.tp.sequence_parallel else Copy
            self._source, self._entered, self._left = x, kind.apply(x, self.tp.group), self.users
        entered = self._entered
        self._left -= 1
        if self._left <= 0:  # the last of them; keep nothing alive
            self._source = self._entered = None
        return entered


class ColumnLinear(AdaptedLinear):
    """A linear of which each rank computes a part of the outputs."""

    entrance: _Entrance
    cut_sequence: bool

    def forward(self, x: Tensor) -> Tensor:
        """x (B, S, E), or (B, S / n, E) under sequence parallelism -> (B, S, this rank's outputs)."""
        return super().forward(self.entrance(x, self.cut_sequence))


class RowLinear(AdaptedLinear):
    """A linear of which each rank has a part of the inputs; the partial products are summed."""

    tp: TensorParallel

    def forward(self, x: Tensor) -> Tensor:
        """x (B, S, this rank's inputs) -> (B, S, E), or (B, S / n, E) under sequence parallelism."""
        kind = ReduceScatterSequence if self.tp.sequence_parallel else Reduce
        out: Tensor = kind.apply(self.product(x), self.tp.group)
        return out if self.bias is None else out + self.bias

    def sum_over_inputs(self, partial: Tensor) -> Tensor:
        """Completed over the ranks, in place."""
        dist.all_reduce(partial, group=self.tp.group)
        return partial


class VocabularyEmbedding(AdaptedEmbedding):
    """An embedding of which each rank has the vectors of a part of the words."""

    tp: TensorParallel
    start: int

    def lookup(self, ids: Tensor) -> Tensor:
        """ids (B, S) -> (B, S, E), whole on every rank."""
        place = ids - self.start
        absent = (place < 0) | (place >= self.weight.shape[0])
        vectors = F.embedding(place.masked_fill(absent, 0), self.weight, self.padding_idx)
        summed: Tensor = Reduce.apply(vectors.masked_fill(absent.unsqueeze(-1), 0.0), self.tp.group)
        return summed


def check_heads(plan: ParallelPlan, size: int) -> None:
    """Raises ConfigError where `size` ranks cannot each have whole attention heads."""
    if plan.heads is not None and plan.heads % size:
        raise ConfigError(f"tp_size {size} does not divide the model's {plan.heads} attention heads")
    if plan.kv_heads is None or plan.kv_heads % size == 0:
        return
    if size % plan.kv_heads or not plan.keys_values:
        why = "" if size % plan.kv_heads else ", and its parallel plan does not name them in keys_values"
        raise ConfigError(
            f"tp_size {size} does not fit the model's {plan.kv_heads} key-value heads: neither divides "
            f"the other{why}" if size % plan.kv_heads else
            f"tp_size {size} is above the model's {plan.kv_heads} key-value heads{why}"
        )


@dataclass
class Cutter:
    """Cuts one complete module on meta for one rank, and keeps the books of its `shards`."""

    plan: ParallelPlan
    tp: TensorParallel
    grid: Grid
    shards: dict[str, Shard]
    _done: dict[int, nn.Parameter] = field(default_factory=dict)  # a tied parameter is cut once
    _entrances: dict[str, _Entrance] = field(default_factory=dict)

    def cut(self, model: nn.Module) -> None:
        """Replace every linear and embedding that the plan names; `shards` of all parameters are updated.

        Raises ConfigError where the sizes cannot be cut, PluginError where the plan names what cannot be.
        """
        check_heads(self.plan, self.tp.size)
        check_blocks(model, self.plan, self.tp.size)
        for path, module in list(model.named_modules(remove_duplicate=False)):
            if isinstance(module, Delta):
                continue  # cut with its linear
            names = [f"{path}.{leaf}" for leaf, _ in module.named_parameters(recurse=False)]
            kinds = [kind for name in names if (kind := self.kind(name)) not in ("whole", "partial", None)]
            if kinds:
                _check_can_be_cut(path, module)
            kind = self.kind(f"{path}.weight")
            if kinds and kind in ("columns", "rows", "embedding", "head"):
                made = self._replace(path, module, kind)
                owner, _, leaf = path.rpartition(".")
                setattr(model.get_submodule(owner), leaf, made)
        for name, shard in self.shards.items():
            self.shards[name] = self._whole(name, shard)

    def kind(self, name: str) -> Kind | None:
        """What the plan says of a parameter; None: nothing."""
        for kind in ("whole", "partial", "head", "embedding", "columns", "rows"):
            if any(fnmatchcase(name, pattern) for pattern in getattr(self.plan, kind)):
                return kind
        return None

    def _whole(self, name: str, shard: Shard) -> Shard:
        """Gradients of a parameter that every tp rank holds: partial sums where its inputs are cut."""
        if shard.cuts or shard.copies > 1:
            return shard
        in_blocks = name.startswith("blocks.")
        partial = self.kind(name) == "partial" or (in_blocks and self.tp.sequence_parallel)
        return replace(shard, copies=self.tp.size, sums=(self.tp.group,) if partial else ())

    def _replace(self, path: str, module: nn.Module, kind: Kind) -> nn.Module:
        weight_name = f"{path}.weight"
        if isinstance(module, nn.Embedding):
            start, length = self.tp.part(module.num_embeddings)
            weight = self._cut(weight_name, module.weight, 0, start, length)
            made = VocabularyEmbedding(length, module.embedding_dim)
            made.weight, made.tp, made.start = weight, self.tp, start
            if module.padding_idx is not None and start <= module.padding_idx < start + length:
                made.padding_idx = module.padding_idx - start  # its vector has no gradient
            if isinstance(module, AdaptedEmbedding):
                made.adapters = module.adapters
            return made
        assert isinstance(module, nn.Linear)
        if kind == "rows":
            start, length = self.tp.part(module.in_features)
            row = RowLinear(length, module.out_features)
            row.packing = getattr(module, "packing", None)
            begin, columns = (packed_columns(row.packing, number) for number in (start, length))
            row.weight = self._cut(weight_name, module.weight, 1, begin, columns)
            row.bias, row.tp = module.bias, self.tp
            self._cut_deltas(path, module, row, kind, start, length)
            return row
        start, length, copies = self._columns(path, module)
        column = ColumnLinear(module.in_features, length)
        column.packing = getattr(module, "packing", None)
        column.weight = self._cut(weight_name, module.weight, 0, start, length, copies)
        if module.bias is not None:
            column.bias = self._cut(f"{path}.bias", module.bias, 0, start, length, copies)
        self._cut_deltas(path, module, column, kind, start, length, copies)
        owner = f"{path.rpartition('.')[0]}:{module.in_features}"
        column.entrance = self._entrances.setdefault(owner, _Entrance(self.tp))
        column.entrance.users += 1
        column.cut_sequence = kind == "columns"  # the head reads what was joined before
        return column

    def _cut_deltas(
        self,
        path: str,
        module: nn.Linear,
        made: AdaptedLinear,
        kind: Kind,
        start: int,
        length: int,
        copies: int = 1,
    ) -> None:
        """Cut the adapters of a linear as it is cut, and give them to the linear that takes its place."""
        for adapter, delta in module.adapters.items() if isinstance(module, AdaptedLinear) else ():
            assert isinstance(delta, Delta)
            along = delta.along_inputs if kind == "rows" else delta.along_outputs
            for leaf, parameter in list(delta.named_parameters(recurse=False)):
                name = f"{path}.adapters.{adapter}.{leaf}"
                if leaf in along:
                    cut = self._cut(name, parameter, along[leaf], start, length, copies)
                    setattr(delta, leaf, cut)
                else:  # each rank's part of the linear gives a part of its gradient
                    shard = replace(self.shards[name], copies=self.tp.size, sums=(self.tp.group,))
                    self.shards[name] = shard
            made.adapters[adapter] = delta

    def _columns(self, path: str, module: nn.Linear) -> tuple[int, int, int]:
        """(start, length, copies) of this rank's rows; key-value heads are repeated where there are few."""
        kv_heads = self.plan.kv_heads
        names_kv = any(fnmatchcase(f"{path}.weight", pattern) for pattern in self.plan.keys_values)
        if kv_heads is None or kv_heads % self.tp.size == 0 or not names_kv:
            return *self.tp.part(module.out_features), 1
        copies = self.tp.size // kv_heads
        width = module.out_features // kv_heads
        return self.tp.rank // copies * width, width, copies

    def _cut(
        self, name: str, parameter: Tensor, dim: int, start: int, length: int, copies: int = 1
    ) -> nn.Parameter:
        if id(parameter) in self._done:
            return self._done[id(parameter)]
        size = list(parameter.shape)
        size[dim] = length
        cut = nn.Parameter(
            torch.empty(size, dtype=parameter.dtype, device="meta"), requires_grad=parameter.requires_grad
        )
        self._done[id(parameter)] = cut
        shard = replace(self.shards[name], local=cut)
        if copies == 1:
            self.shards[name] = shard.cut(dim, start, self.tp.group)
        else:
            offsets = tuple(o + (start if d == dim else 0) for d, o in enumerate(shard.offsets))
            sharing, heads = self.grid.sharing(copies)
            cuts = () if heads is None else ((dim, heads),)
            self.shards[name] = replace(shard, offsets=offsets, cuts=cuts, sums=(sharing,), copies=copies)
        return cut


def _check_can_be_cut(path: str, module: nn.Module) -> None:
    """Raise PluginError for a module whose forward pass would be lost: only the library's own are known."""
    if type(module) not in (nn.Linear, AdaptedLinear, nn.Embedding, AdaptedEmbedding):
        raise PluginError(
            f"the parallel plan cuts {path}, a {type(module).__name__}; only nn.Linear and nn.Embedding "
            "themselves can be cut, as what a subclass computes would be lost"
        )
    if getattr(module, "multiply", None) is not None:
        raise PluginError(f"the parallel plan cuts {path}, whose product a plugin computes from the whole")
    if isinstance(module, nn.Embedding):
        changes = [key for key in ("max_norm", "scale_grad_by_freq", "sparse") if getattr(module, key)]
        if changes:
            raise PluginError(
                f"the parallel plan cuts {path}, an embedding with {changes[0]}, which needs the whole"
            )
