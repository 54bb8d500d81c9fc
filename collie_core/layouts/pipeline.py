"""Pipeline schedules: in which order a rank runs forward and backward passes, and what it sends and receives.

GPipe (Huang et al. 2019, arXiv 1811.06965), 1F1B (Narayanan et al. 2019, arXiv 1806.03377) and interleaved
1F1B (Narayanan et al. 2021, arXiv 2104.04473, section 2.2).  Micro-batches may differ in rows and length.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from collie_core.data.batch import MicroBatch
    from collie_core.layouts.grid import Grid
    from collie_core.layouts.stage import Stage

Schedule = Literal["1f1b", "gpipe", "interleaved"]


class Action(NamedTuple):
    """Run micro-batch `micro` through the rank's stretch of blocks number `stretch`, forward or backward."""

    forward: bool
    stretch: int
    micro: int


def actions(schedule: Schedule, ranks: int, rank: int, stretches: int, micros: int) -> list[Action]:
    """What a rank of the pipeline does, in order.

    stretches: of blocks of a rank (1 but for interleaved, where stretch c of rank r is number
    c * ranks + r of the model).
    """
    rounds = max(1, micros // ranks) if stretches > 1 else micros
    sizes = [micros // rounds + (index < micros % rounds) for index in range(rounds)]
    forward: list[Action] = []
    backward: list[Action] = []
    begin = 0
    for size in sizes:
        members = range(begin, begin + size)
        for stretch in range(stretches):
            forward += [Action(True, stretch, micro) for micro in members]
            backward += [Action(False, stretches - 1 - stretch, micro) for micro in members]
        begin += size
    if schedule == "gpipe":
        warm_up = len(forward)
    elif stretches == 1:
        warm_up = ranks - rank - 1
    else:
        warm_up = 2 * (ranks - rank - 1) + (stretches - 1) * max(sizes)
    warm_up = min(warm_up, len(forward))
    order = forward[:warm_up]
    for one, other in zip(forward[warm_up:], backward, strict=False):
        order += [one, other]
    return order + backward[len(forward) - warm_up :]


def most_alive(order: Sequence[Action]) -> int:
    """The most passes that a rank has begun and not ended at any time."""
    return max(accumulate((1 if action.forward else -1 for action in order), initial=0))


@dataclass
class Pipeline:
    """Moves activations and gradients between the stages of one pipeline.

    stages: this rank's stretches.  Each directed neighbourhood has a group of its own, so that what is sent
    one way never waits for what comes the other way.  A sent tensor lives until it was received; not more of
    them than the schedule has passes alive are under way in either direction.
    """

    grid: Grid
    stages: Sequence[Stage]
    width: int
    dtype: torch.dtype
    _ways: dict[tuple[bool, int], ProcessGroup] = field(default_factory=dict)
    _sent: dict[bool, deque[tuple[dist.Work, Tensor]]] = field(
        default_factory=lambda: {True: deque(), False: deque()}
    )
    _most_sent: int = 1

    def __post_init__(self) -> None:
        """Make the groups: (forward, sender's stage) -> the sender and its receiver, in all pipelines."""
        grid, size = self.grid, self.grid.pp.size
        for forward in (True, False):
            for sender in range(size):
                receiver = sender + (1 if forward else -1)
                if not 0 <= receiver < size and len(self.stages) == 1:
                    continue  # only a rank of several stretches sends from the last rank to the first
                for pipeline in grid.pipelines():
                    group = grid.new_group([pipeline[sender], pipeline[receiver % size]])
                    if group is not None:
                        self._ways[forward, sender] = group

    def run(
        self,
        schedule: Schedule,
        batches: Sequence[MicroBatch],
        loss_of: Callable[[Tensor], Tensor],
        last_backward: Callable[[Stage], None],
    ) -> Tensor:
        """Forward and backward of all micro-batches; their summed losses (fp32) on the last stage, else 0.

        loss_of: what is differentiated, of a micro-batch's summed loss.  last_backward: called before the
        backward pass that completes a stretch's gradients.
        """
        order = actions(schedule, self.grid.pp.size, self.grid.pp.rank, len(self.stages), len(batches))
        self._most_sent = most_alive(order)
        total = torch.zeros((), dtype=torch.float32, device=self.grid.device)
        alive: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}
        left = {stretch: len(batches) for stretch in range(len(self.stages))}
        for action in order:
            stage, batch = self.stages[action.stretch], batches[action.micro]
            received = self._received(action, batch)
            if action.forward:
                h = received
                if h is not None and stage.trains_before:
                    h.requires_grad_()
                out = stage(batch, h)
                if stage.head is not None:
                    total += out.detach()
                    out = loss_of(out)
                else:
                    self._send(True, out.detach())
                alive[action.stretch, action.micro] = h, out
                continue
            h, out = alive.pop((action.stretch, action.micro))
            left[action.stretch] -= 1
            if left[action.stretch] == 0:
                last_backward(stage)
            if out.requires_grad:  # nothing may be trained so far
                torch.autograd.backward(out, received)
            if stage.trains_before:
                assert h is not None
                self._send(False, torch.zeros_like(h) if h.grad is None else h.grad)
        self._settle()
        return total

    @torch.no_grad()
    def evaluate(self, batch: MicroBatch) -> Tensor:
        """Forward of one batch; its summed loss (fp32) on the last stage, else 0."""
        total = torch.zeros((), dtype=torch.float32, device=self.grid.device)
        order = [Action(True, stretch, 0) for stretch in range(len(self.stages))]
        self._most_sent = most_alive(order)
        for action in order:
            out = self.stages[action.stretch](batch, self._received(action, batch), custom=False)
            if self.stages[action.stretch].head is None:
                self._send(True, out)
            else:
                total += out
        self._settle()
        return total

    def receive(self, shape: tuple[int, ...]) -> Tensor:
        """The hidden output of the stage before."""
        return self._receive(True, shape)

    def send(self, h: Tensor) -> None:
        """The hidden output to the next stage."""
        self._send(True, h)
        self._settle()

    def _received(self, action: Action, batch: MicroBatch) -> Tensor | None:
        """What an action needs: hidden states where no embedding is; gradients where no head is, and
        something is trained.

        It is asked for when it is needed, never ahead: what waits for the whole device (the loading of a
        kernel, say) waits for an open receive too, and ranks would wait for each other in a circle.
        """
        stage = self.stages[action.stretch]
        if (stage.embed if action.forward else stage.head) is not None:
            return None
        if not action.forward and not stage.trains:
            return None
        return self._receive(action.forward, (batch.input_ids.shape[0], stage.length(batch), self.width))

    def _receive(self, forward: bool, shape: tuple[int, ...]) -> Tensor:
        grid = self.grid
        sender = (grid.pp.rank + (-1 if forward else 1)) % grid.pp.size
        tensor = torch.empty(shape, dtype=self.dtype, device=grid.device)
        dist.recv(tensor, grid.stage_rank(sender), group=self._ways[forward, sender])
        return tensor

    def _send(self, forward: bool, tensor: Tensor) -> None:
        grid = self.grid
        receiver = (grid.pp.rank + (1 if forward else -1)) % grid.pp.size
        tensor = tensor.contiguous()
        work = dist.isend(tensor, grid.stage_rank(receiver), group=self._ways[forward, grid.pp.rank])
        assert work is not None
        sent = self._sent[forward]
        sent.append((work, tensor))
        while sent and (sent[0][0].is_completed() or len(sent) > self._most_sent):
            sent.popleft()[0].wait()  # gloo knows that one was received only when it is waited for

    def _settle(self) -> None:
        """Wait until everything sent has left."""
        for sent in self._sent.values():
            while sent:
                sent.popleft()[0].wait()
