"""The grid of processes: pipeline x data x tensor, and the groups in which they talk.

Ranks count tensor-parallel neighbours first, then data, then pipeline, so that those who talk most sit
on one machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from collie_core.launch.world import open_group_of_one

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from collie_core.config.schema import CollieConfig
    from collie_core.run import Run


def data_rank(config: CollieConfig, rank: int) -> int:
    """Which part of the data a rank reads."""
    return rank // config.tp_size % config.dp_size


@dataclass(frozen=True)
class Axis:
    """One direction of the grid as this rank sees it.  group is None where there is one rank."""

    size: int = 1
    rank: int = 0
    group: ProcessGroup | None = None

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor` summed over the axis, in place."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor


class Grid:
    """Axes `pp`, `dp` and `tp`, `replica` (dp x tp: the ranks of one stage), and `world`.

    control: all ranks over gloo, for messages between hosts; ends: first and last stage of this pipeline.
    mesh: the data-parallel ranks as FSDP2 wants them, also where there is one.
    """

    def __init__(self, run: Run, sharded: bool = False) -> None:
        """sharded: FSDP2 holds the parameters, for which even one process opens a process group."""
        config = run.config
        self.device = run.device
        sizes = (config.pp_size, config.dp_size, config.tp_size)
        self.pp = self.dp = self.tp = self.replica = self.world = Axis()
        self.control: ProcessGroup | None = None
        self.ends: ProcessGroup | None = None
        self.mesh: DeviceMesh | None = None
        self._made: list[ProcessGroup] = []
        self._opened = sharded and not dist.is_initialized()
        if self._opened:
            open_group_of_one(run.device)
        if not dist.is_initialized():
            return
        pp, dp, tp = sizes
        ranks = torch.arange(pp * dp * tp).reshape(sizes)
        self._groups: dict[tuple[int, ...], ProcessGroup | None] = {}
        self.world = Axis(run.world_size, run.rank, dist.group.WORLD)
        self.pp = self._axis([ranks[:, d, t] for d, t in product(range(dp), range(tp))])
        self.dp = self._axis([ranks[p, :, t] for p, t in product(range(pp), range(tp))])
        self.tp = self._axis([ranks[p, d, :] for p, d in product(range(pp), range(dp))])
        self.replica = self._axis([ranks[p].flatten() for p in range(pp)])
        self.control = run.control
        if pp > 1:
            self.ends = self._axis([ranks[[0, -1], d, t] for d, t in product(range(dp), range(tp))]).group
        self._ranks = ranks
        self._sharing: dict[int, tuple[ProcessGroup, ProcessGroup | None]] = {}

    @property
    def first(self) -> bool:
        """True on the pipeline's first stage."""
        return self.pp.rank == 0

    @property
    def last(self) -> bool:
        """True on the pipeline's last stage."""
        return self.pp.rank == self.pp.size - 1

    def stage_rank(self, stage: int) -> int:
        """The global rank of `stage` in this rank's pipeline."""
        return int(self._ranks[stage, self.dp.rank, self.tp.rank])

    def pipelines(self) -> list[list[int]]:
        """The global ranks of every pipeline, stage by stage."""
        pp, dp, tp = self._ranks.shape
        return [self._ranks[:, d, t].tolist() for d, t in product(range(dp), range(tp))]

    def sharing(self, copies: int) -> tuple[ProcessGroup, ProcessGroup | None]:
        """Of tensor-parallel ranks of which `copies` neighbours hold the same: those that hold the same as
        this one, and one of every such neighbourhood.  All ranks ask for it together."""
        if copies not in self._sharing:
            rows = self._ranks.flatten(0, 1).unflatten(1, (-1, copies))  # (pp dp, heads, copies)
            same = self._axis([row for neighbours in rows for row in neighbours])
            one_each = self._axis([neighbours[:, c] for neighbours in rows for c in range(copies)])
            assert same.group is not None
            self._sharing[copies] = same.group, one_each.group
        return self._sharing[copies]

    def data_mesh(self) -> DeviceMesh:
        """The data-parallel ranks as a mesh; made when it is first asked for, by all ranks together."""
        from torch.distributed.device_mesh import DeviceMesh

        if self.mesh is None:
            group = self.dp.group
            if group is None:
                group = dist.new_group([self.world.rank], use_local_synchronization=True)
                self._made.append(group)
            self.mesh = DeviceMesh.from_group(group, self.device.type, mesh_dim_names=("dp",))
        return self.mesh

    def new_group(self, ranks: list[int]) -> ProcessGroup | None:
        """A group of its own of these ranks, where this rank is one of them; every rank makes every group."""
        group = dist.new_group(ranks)
        if self.world.rank not in ranks:
            return None
        self._made.append(group)
        return group

    def close(self) -> None:
        """Give back the groups; all ranks are done with them."""
        while self._made and dist.is_initialized():
            dist.destroy_process_group(self._made.pop())
        if self._opened and dist.is_initialized():
            dist.destroy_process_group()

    def _axis(self, members: list[Tensor]) -> Axis:
        """The axis of which `members` are the groups; one of all ranks, or of ranks that an earlier axis has
        together, needs none of its own."""
        found = Axis()
        for group_ranks in members:
            ranks = tuple(sorted(set(group_ranks.tolist())))
            if len(ranks) == 1:
                continue
            if ranks not in self._groups:
                whole = len(ranks) == self.world.size
                self._groups[ranks] = dist.group.WORLD if whole else self.new_group(list(ranks))
            if self.world.rank in ranks:
                found = Axis(len(ranks), ranks.index(self.world.rank), self._groups[ranks])
        return found
