"""What processes of a run do together: values of the first on a machine, and errors of one raised on all."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from collie_core.config.problems import ConfigProblems
from collie_core.errors import DataError, OutOfMemory
from collie_core.together import from_first, from_first_on_node, together


class Local(Exception):
    """An error that no other process can make again."""

    def __init__(self, left: int, right: object) -> None:
        super().__init__(f"{left} is not {right}")
        self.right = right


def fail(error: BaseException) -> None:
    raise error


def cases(rank: int) -> dict[str, Callable[[], Any]]:
    located = ConfigProblems([(("train", "epochs"), "is too many")], lambda path: "train.yaml:3")
    return {
        "value": lambda: from_first_on_node(lambda: rank + 5),
        "config": lambda: from_first(lambda: fail(located)),
        "data": lambda: together(lambda: fail(DataError("record 7")) if rank == 1 else rank),
        "memory": lambda: together(lambda: fail(OutOfMemory("too large")) if rank == 1 else rank),
        "local": lambda: together(lambda: fail(Local(1, lambda: 2)) if rank == 1 else rank),
        "disk": lambda: together(lambda: fail(OSError(28, "No space", "file")) if rank == 1 else rank),
    }


def process(rank: int, size: int, store: str, told: Any) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
    found = {}
    for name, act in cases(rank).items():
        try:
            found[name] = repr(act())
        except Exception as error:
            found[name] = f"{type(error).__name__} {getattr(error, 'exit_status', None)} {error}"
    told.put((rank, found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, str]]:
    """What each of three processes saw, by case."""
    context = multiprocessing.get_context("fork")
    told, store = context.Queue(), str(Path(tmp_path_factory.mktemp("together")) / "store")
    processes = [context.Process(target=process, args=(rank, 3, store, told)) for rank in range(3)]
    for one in processes:
        one.start()
    answers = dict(told.get(timeout=60) for _ in processes)
    for one in processes:
        one.join()
    return answers


@pytest.mark.parametrize(
    ("case", "own", "others"),
    [
        ("value", "5", "5"),
        ("config", "ConfigProblems 2 train.yaml:3: train.epochs: is too many", None),
        ("data", "DataError 2 record 7", None),
        ("memory", "OutOfMemory 3 too large", None),
        ("local", "Local None 1 is not <function", "CollieError 1 Local: 1 is not <function"),
        ("disk", "OSError None [Errno 28] No space: 'file'", None),
    ],
)
def test_all_see_what_one_did(
    found: dict[int, dict[str, str]], case: str, own: str, others: str | None
) -> None:
    assert found[1][case].startswith(own)
    for rank in (0, 2):
        assert found[rank][case].startswith(others or own)
