"""The order of work in a pipeline, played through without processes: messages are first in, first out."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

import pytest

from collie_core.layouts.pipeline import Action, Schedule, actions, most_alive

SIZES = [(ranks, micros) for ranks in (2, 3, 4, 8) for micros in (1, 2, 3, 4, 5, 7, 8, 16, 17)]
CASES: list[tuple[Schedule, int, int, int]] = [
    *[("1f1b", ranks, 1, micros) for ranks, micros in SIZES],
    *[("gpipe", ranks, 1, micros) for ranks, micros in SIZES],
    *[("interleaved", ranks, stretches, micros) for ranks, micros in SIZES for stretches in (2, 3)],
]


@dataclass
class Player:
    """Plays the orders of all ranks; a message carries the number of its stage and its micro-batch.

    edges: (forward, sender) -> messages under way.  most_sent: how many there may be when a rank goes on.
    time: of each rank, an action taking one.
    """

    ranks: int
    stretches: int
    orders: list[deque[Action]]
    most_sent: list[int]
    edges: dict[tuple[bool, int], deque[tuple[int, int, int]]] = field(default_factory=dict)
    done: list[tuple[int, Action]] = field(default_factory=list)
    time: list[int] = field(default_factory=list)

    def play(self) -> None:
        """Until every rank is done or none can go on."""
        self.time = [0] * self.ranks
        while any(self._advance(rank) for rank in range(self.ranks)):
            pass
        waiting = {rank: order[0] for rank, order in enumerate(self.orders) if order}
        assert not waiting, f"deadlock: {waiting}"
        assert not any(self.edges.values()), "messages that nobody received"

    def _advance(self, rank: int) -> bool:
        if not self.orders[rank]:
            return False
        if any(len(self.edges.get((way, rank), ())) > self.most_sent[rank] for way in (True, False)):
            return False
        action = self.orders[rank][0]
        stage, last = action.stretch * self.ranks + rank, self.ranks * self.stretches - 1
        ready = 0
        if stage != (0 if action.forward else last):
            sender = (rank + (-1 if action.forward else 1)) % self.ranks
            edge = self.edges.get((action.forward, sender))
            if not edge:
                return False
            *message, ready = edge.popleft()
            from_stage = stage + (-1 if action.forward else 1)
            assert message == [from_stage, action.micro], f"{action} of stage {stage} received {message}"
        self.orders[rank].popleft()
        self.time[rank] = max(self.time[rank], ready) + 1
        self.done.append((stage, action))
        if stage != (last if action.forward else 0):
            edge = self.edges.setdefault((action.forward, rank), deque())
            edge.append((stage, action.micro, self.time[rank]))
        return True


def played(schedule: Schedule, ranks: int, stretches: int, micros: int) -> Player:
    orders = [actions(schedule, ranks, rank, stretches, micros) for rank in range(ranks)]
    player = Player(ranks, stretches, [deque(order) for order in orders], [most_alive(o) for o in orders])
    player.play()
    return player


@pytest.mark.parametrize(("schedule", "ranks", "stretches", "micros"), CASES)
def test_everything_is_done_once_in_an_order_that_cannot_lock(
    schedule: Schedule, ranks: int, stretches: int, micros: int
) -> None:
    player = played(schedule, ranks, stretches, micros)
    expected = {
        (stretch * ranks + rank, Action(forward, stretch, micro))
        for rank in range(ranks)
        for stretch in range(stretches)
        for micro in range(micros)
        for forward in (True, False)
    }
    assert Counter(player.done) == Counter(expected)
    place = {what: number for number, what in enumerate(player.done)}
    assert all(
        place[stage, action] < place[stage, action._replace(forward=False)]
        for stage, action in expected
        if action.forward
    )


@pytest.mark.parametrize(("ranks", "micros"), SIZES)
def test_what_is_kept(ranks: int, micros: int) -> None:
    for rank in range(ranks):
        assert most_alive(actions("gpipe", ranks, rank, 1, micros)) == micros
        assert most_alive(actions("1f1b", ranks, rank, 1, micros)) == min(ranks - rank, micros)


@pytest.mark.parametrize("ranks", [2, 4])
def test_more_stretches_leave_less_idle_time(ranks: int) -> None:
    """Time in units of one stretch: (2 micros + 2 (ranks - 1) / stretches) x stretches: arXiv 2104.04473."""
    micros = 4 * ranks
    for schedule, stretches in (("1f1b", 1), ("gpipe", 1), ("interleaved", 2)):
        player = played(schedule, ranks, stretches, micros)  # type: ignore[arg-type]
        assert max(player.time) == 2 * micros * stretches + 2 * (ranks - 1)
