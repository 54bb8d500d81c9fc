"""The order of work in a pipeline, played through without processes: messages are first in, first out."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

import pytest

from collie_core.layouts.pipeline import Action, Schedule, actions

SIZES = [(ranks, micros) for ranks in (2, 3, 4, 8) for micros in (1, 2, 3, 4, 5, 7, 8, 16, 17)]
CASES: list[tuple[Schedule, int, int, int]] = [
    *[("1f1b", ranks, 1, micros) for ranks, micros in SIZES],
    *[("gpipe", ranks, 1, micros) for ranks, micros in SIZES],
    *[("interleaved", ranks, chunks, micros) for ranks, micros in SIZES for chunks in (2, 3)],
]


@dataclass
class Player:
    """Plays the orders of all ranks; a message carries the number of its stage and its micro-batch.

    edges: (forward, sender) -> messages under way.  time: of each rank, an action taking one.
    """

    ranks: int
    chunks: int
    orders: list[deque[Action]]
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
        action = self.orders[rank][0]
        stage, last = action.chunk * self.ranks + rank, self.ranks * self.chunks - 1
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


def played(schedule: Schedule, ranks: int, chunks: int, micros: int) -> Player:
    orders = [deque(actions(schedule, ranks, rank, chunks, micros)) for rank in range(ranks)]
    player = Player(ranks, chunks, orders)
    player.play()
    return player


def most_alive(schedule: Schedule, ranks: int, rank: int, chunks: int, micros: int) -> int:
    """Most activations that a rank keeps at once."""
    alive = most = 0
    for action in actions(schedule, ranks, rank, chunks, micros):
        alive += 1 if action.forward else -1
        most = max(most, alive)
    assert alive == 0
    return most


@pytest.mark.parametrize(("schedule", "ranks", "chunks", "micros"), CASES)
def test_everything_is_done_once_in_an_order_that_cannot_lock(
    schedule: Schedule, ranks: int, chunks: int, micros: int
) -> None:
    player = played(schedule, ranks, chunks, micros)
    expected = {
        (chunk * ranks + rank, Action(forward, chunk, micro))
        for rank in range(ranks)
        for chunk in range(chunks)
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
        assert most_alive("gpipe", ranks, rank, 1, micros) == micros
        assert most_alive("1f1b", ranks, rank, 1, micros) == min(ranks - rank, micros)


@pytest.mark.parametrize("ranks", [2, 4])
def test_more_stretches_leave_less_idle_time(ranks: int) -> None:
    """Time in units of one stretch: (2 micros + 2 (ranks - 1) / chunks) x chunks, as in arXiv 2104.04473."""
    micros = 4 * ranks
    for schedule, chunks in (("1f1b", 1), ("gpipe", 1), ("interleaved", 2)):
        player = played(schedule, ranks, chunks, micros)  # type: ignore[arg-type]
        assert max(player.time) == 2 * micros * chunks + 2 * (ranks - 1)
