"""Tensors in a folder, written and read by real groups of processes (gloo): shards, replicas, resharding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from collie_core.checkpoint.store import load_tensors, read_metadata, save_tensors, stream_tensors

#: Run by each rank: `RANKS_SCRIPT FOLDER`.  What a rank finds goes to FOLDER/found_RANK.json.
RANKS_SCRIPT = """
import json, os, sys
from pathlib import Path
import torch
import torch.distributed as dist
from collie_core.checkpoint.store import TensorSave, load_tensors, save_tensors, stream_tensors
from collie_core.shard import Piece

torch.set_num_threads(1)
folder, rank, size = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
dims = {"rows": 0, "columns": 1, "few_rows": 0, "half": 0}

def placed(full):
    cut = {name: tensor.clone() for name, tensor in full.items()}
    for name, dim in dims.items():
        length = full[name].shape[dim]
        each = -(-length // size)
        begin = min(length, rank * each)
        part = full[name].narrow(dim, begin, min(each, length - begin)).clone()
        offsets = tuple(begin if d == dim else 0 for d in range(full[name].ndim))
        cut[name] = Piece(part, tuple(full[name].shape), offsets)
    return cut

def local(value):
    return Piece.of(value).local

def problem(action):
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"

full = dict(stream_tensors(folder / "one_process"))
state = placed(full)
own = {f"only_{rank}": torch.full((3,), float(rank))}
save_tensors(state | own, folder / "ranks")
(folder / "copies").mkdir(exist_ok=True)
saving = TensorSave(state, copy=True)
saving.finish(folder / "copies", lambda: saving.write(folder / "copies"))

found = {"size": size}
for source in ("one_process", "ranks", "copies", "two_ranks"):
    if (folder / source).is_dir():
        target = placed({name: torch.zeros_like(tensor) for name, tensor in full.items()})
        load_tensors(target, folder / source)
        same = [torch.equal(local(target[name]), local(state[name])) for name in state]
        found[source] = len(same) if all(same) else 0
mine = {f"only_{rank}": torch.zeros(3)}
load_tensors(mine, folder / "ranks")
found["own"] = mine[f"only_{rank}"].tolist()

# what one rank does wrong, every rank is told
lone = {"plain": torch.zeros(4)} | ({"lost": torch.zeros(1)} if rank == 1 else {})
found["missing"] = problem(lambda: load_tensors(lone, folder / "ranks"))
found["no_tensor"] = problem(lambda: save_tensors({"epoch": 3} if rank == 1 else {}, folder / "bad"))
blocked = folder / "blocked"
blocked.mkdir(exist_ok=True)
(blocked / "tensors_00001.safetensors").mkdir(exist_ok=True)  # so rank 1 cannot write its file
dist.barrier()
found["blocked"] = problem(lambda: save_tensors(state, blocked))
found["metadata_of_blocked"] = (blocked / "metadata.json").exists()
(folder / f"found_{rank}.json").write_text(json.dumps(found))
dist.barrier()
dist.destroy_process_group()
"""


def full_tensors() -> dict[str, Tensor]:
    """Sizes that the ranks do not divide: 251 rows on 2 or 3, and 1 row on more than one rank."""
    return {
        "rows": torch.randn(251, 8),
        "columns": torch.randn(6, 13),
        "few_rows": torch.randn(1, 5),
        "half": torch.randn(10, 3).bfloat16(),
        "replicated": torch.randn(7),
        "scalar": torch.tensor(3.0),
        "plain": torch.randn(4),
    }


@dataclass
class Ranks:
    """What a group of processes left: its folder and the findings of each rank."""

    folder: Path
    found: list[dict[str, object]]
    full: dict[str, Tensor]


def run_ranks(folder: Path, size: int) -> list[dict[str, object]]:
    command = [sys.executable, "-c", RANKS_SCRIPT, str(folder)]
    environments = [os.environ | {"RANK": str(rank), "WORLD_SIZE": str(size)} for rank in range(size)]
    ranks = [subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) for env in environments]
    try:
        errors = [rank.communicate(timeout=60)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * size, "\n".join(errors)
    return [json.loads((folder / f"found_{rank}.json").read_text()) for rank in range(size)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    folder = tmp_path_factory.mktemp("two")
    full = full_tensors()
    save_tensors(full, folder / "one_process")
    return Ranks(folder, run_ranks(folder, 2), full)


def test_each_rank_writes_its_shards_and_replicas_are_written_once(two: Ranks) -> None:
    files = [load_file(two.folder / "ranks" / f"tensors_0000{rank}.safetensors") for rank in (0, 1)]
    assert files[0]["rows@0,0"].shape == (126, 8)
    assert files[1]["rows@126,0"].shape == (125, 8)
    assert files[1]["columns@0,7"].shape == (6, 6)
    assert "few_rows" in files[0]
    assert not any(name.startswith("few_rows") for name in files[1])
    for name in ("replicated", "scalar", "plain"):
        assert sum(name in file for file in files) == 1
    content = sum(tensor.numel() * tensor.element_size() for tensor in two.full.values()) + 2 * 3 * 4
    assert (
        sum(tensor.numel() * tensor.element_size() for file in files for tensor in file.values()) == content
    )


def test_one_process_reads_what_two_ranks_wrote(two: Ranks) -> None:
    for source, expected in (
        ("ranks", two.full | {"only_0": torch.zeros(3), "only_1": torch.ones(3)}),
        ("copies", two.full),
    ):
        loaded = {name: torch.full_like(tensor, 9.0) for name, tensor in expected.items()}
        load_tensors(loaded, two.folder / source)
        streamed = dict(stream_tensors(two.folder / source))
        assert list(map(sorted, (loaded, streamed))) == [sorted(expected)] * 2
        for name, tensor in expected.items():
            assert torch.equal(loaded[name], tensor), name
            assert torch.equal(streamed[name], tensor), name
            assert streamed[name].dtype == tensor.dtype


def test_two_ranks_read_their_part_of_what_one_or_two_processes_wrote(two: Ranks) -> None:
    for rank, found in enumerate(two.found):
        assert [found[source] for source in ("one_process", "ranks", "copies")] == [7, 7, 7]
        assert found["own"] == [float(rank)] * 3


def test_an_error_of_one_rank_is_raised_on_all_as_an_ordinary_exception(two: Ranks) -> None:
    for found in two.found:
        assert str(found["missing"]).startswith("CheckpointError: ")
        assert "lost is missing" in str(found["missing"])
        assert str(found["no_tensor"]).startswith("CheckpointError: ")
        assert "'epoch' is no tensor" in str(found["no_tensor"])
        assert str(found["blocked"]).startswith("IsADirectoryError: ")
        assert not found["metadata_of_blocked"]


def test_three_ranks_read_what_two_wrote(two: Ranks, tmp_path: Path) -> None:
    (tmp_path / "one_process").symlink_to(two.folder / "one_process")
    (tmp_path / "two_ranks").symlink_to(two.folder / "ranks")
    for found in run_ranks(tmp_path, 3):
        assert [found[source] for source in ("two_ranks", "ranks")] == [7, 7]
    chunks = read_metadata(tmp_path / "ranks").tensors["rows"].chunks
    assert sorted(chunk.sizes[0] for chunk in chunks) == [83, 84, 84]
