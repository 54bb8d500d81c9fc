"""CheckpointManager: what is kept, replaced, moved aside, refused and reported."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from collie_core.checkpoint.folder import is_checkpoint, open_checkpoint
from collie_core.checkpoint.manager import CheckpointManager
from collie_core.checkpoint.store import TensorSave, load_tensors, save_tensors, stream_tensors
from collie_core.errors import CheckpointError, RunFailed

TENSORS = "tensors_00000.safetensors"


def writer(value: float) -> Callable[[Path], None]:
    return lambda folder: save_tensors({"w": torch.full((50, 3), value)}, folder)


def value_of(folder: Path) -> float:
    return dict(stream_tensors(folder))["w"][0, 0].item()


def save(manager: CheckpointManager, *steps: int) -> None:
    for step in steps:
        manager.save(step, writer(step), {"step": step})


def names(manager: CheckpointManager) -> list[str]:
    return sorted(path.name for path in manager.folder.iterdir())


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.fixture
def manager(tmp_path: Path) -> CheckpointManager:
    return CheckpointManager(tmp_path / "run", keep=2)


def test_a_run_without_checkpoints(manager: CheckpointManager) -> None:
    assert manager.latest() is None
    manager.output_dir.mkdir()
    assert not is_checkpoint(manager.output_dir)
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run folder"):
        manager.open(manager.output_dir)
    with pytest.raises(CheckpointError, match="is no folder"):
        manager.open(manager.output_dir / "typo")


def test_what_is_saved_is_found(manager: CheckpointManager) -> None:
    state = {"epoch": 1, "position": [3, 4], "loss": 0.1 + 0.2, "note": "né"}
    path = manager.save(10, writer(1.5), state)
    assert path == manager.folder / "step_000010"
    assert sorted(entry.name for entry in path.iterdir()) == [
        "manifest.json",
        "metadata.json",
        "state.json",
        TENSORS,
    ]
    checkpoint = manager.latest()
    assert checkpoint is not None
    assert (checkpoint.path, checkpoint.step, checkpoint.state()) == (path, 10, state)
    assert value_of(checkpoint.path) == 1.5
    assert is_checkpoint(path)
    assert is_checkpoint(manager.output_dir)
    assert manager.open(manager.output_dir) == manager.open(path) == checkpoint


def test_long_runs_sort_by_number(manager: CheckpointManager) -> None:
    save(manager, 999_999, 1_000_000)
    latest = manager.latest()
    assert latest is not None
    assert latest.path.name == "step_1000000"


def test_keep_retains_the_newest(manager: CheckpointManager) -> None:
    save(manager, 1, 2, 3, 10)
    assert names(manager) == ["step_000003", "step_000010"]


def test_keep_one(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep=1)
    save(manager, 1, 2)
    assert names(manager) == ["step_000002"]


def test_damaged_and_foreign_folders_do_not_count_and_are_never_deleted(manager: CheckpointManager) -> None:
    save(manager, 1, 2)
    (manager.folder / "step_000002" / TENSORS).write_bytes(b"cut")
    (manager.folder / "step_000000").mkdir()  # by somebody else
    (manager.folder / "notes").mkdir()
    (manager.folder / "step_000009.bak").mkdir()
    save(manager, 3)
    others = ["notes", "step_000000", "step_000009.bak"]
    assert names(manager) == sorted([*others, "step_000001", "step_000002", "step_000003"])
    save(manager, 4)
    assert names(manager) == sorted([*others, "step_000002", "step_000003", "step_000004"])


def test_newer_checkpoints_of_an_abandoned_course(manager: CheckpointManager) -> None:
    """A run that resumed from an early checkpoint never loses what it has just written to later ones."""
    save(manager, 5, 6)
    manager.save(1, writer(7.0), {"step": 1})
    assert names(manager) == ["step_000001", "step_000005", "step_000006"]
    manager.set_aside_after(1)
    superseded = [".step_000005.superseded-1", ".step_000006.superseded-1"]
    assert names(manager) == [*superseded, "step_000001"]
    latest = manager.latest()
    assert latest is not None
    assert (latest.step, value_of(latest.path)) == (1, 7.0)


def test_the_same_step_again_replaces_a_whole_checkpoint(manager: CheckpointManager) -> None:
    manager.save(5, writer(1.0), {"try": 1})
    manager.save(5, writer(2.0), {"try": 2})
    assert names(manager) == ["step_000005"]
    latest = manager.latest()
    assert latest is not None
    assert (value_of(latest.path), latest.state()) == (2.0, {"try": 2})


def test_the_same_step_again_moves_a_damaged_one_aside(manager: CheckpointManager) -> None:
    for number in (1, 2):
        manager.save(5, writer(1.0), {})
        flip_bit(manager.folder / "step_000005" / TENSORS)
        manager.save(5, writer(2.0), {})
        damaged = [f".step_000005.damaged-{n}" for n in range(1, number + 1)]
        assert names(manager) == [*damaged, "step_000005"]
    assert value_of(manager.folder / ".step_000005.damaged-1") != 2.0


def test_the_newest_whole_one_is_used_and_the_others_are_named(
    manager: CheckpointManager, caplog: pytest.LogCaptureFixture
) -> None:
    manager.keep = 9
    save(manager, 1, 2, 3, 4)
    flip_bit(manager.folder / "step_000003" / TENSORS)
    (manager.folder / "step_000004" / "manifest.json").unlink()
    with caplog.at_level(logging.WARNING):
        latest = manager.latest()
    assert latest is not None
    assert latest.step == 2
    assert [record.getMessage().count("is passed over") for record in caplog.records] == [1, 1]
    assert "step_000004/manifest.json is missing" in caplog.records[0].getMessage()
    assert f"step_000003/{TENSORS} is damaged: sha256" in caplog.records[1].getMessage()


def test_the_warning_reaches_stderr_of_a_plain_script(manager: CheckpointManager) -> None:
    save(manager, 1, 2)
    flip_bit(manager.folder / "step_000002" / TENSORS)
    script = "import sys, collie_core.checkpoint.folder as f; print(f.find_latest(sys.argv[1]).step)"
    command = [sys.executable, "-c", script, str(manager.output_dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
    assert "step_000002 is passed over" in done.stderr


def test_size_mode_finds_cuts_only(manager: CheckpointManager) -> None:
    save(manager, 1, 2)
    flip_bit(manager.folder / "step_000002" / TENSORS)
    quick = CheckpointManager(manager.output_dir, verify="size")
    latest = quick.latest()
    assert latest is not None
    assert latest.step == 2
    os.truncate(manager.folder / "step_000002" / TENSORS, 100)
    latest = quick.latest()
    assert latest is not None
    assert latest.step == 1


def test_opening_a_damaged_one_names_the_cause_and_the_nearest_whole_one(manager: CheckpointManager) -> None:
    manager.keep = 9
    save(manager, 1, 2, 3)
    flip_bit(manager.folder / "step_000002" / TENSORS)
    with pytest.raises(CheckpointError) as caught:
        manager.open(manager.folder / "step_000002")
    assert f"{TENSORS} is damaged" in str(caught.value)
    assert "step_000001 is whole" in str(caught.value)
    shutil.rmtree(manager.folder / "step_000001")
    with pytest.raises(CheckpointError, match="step_000003 is whole"):
        manager.open(manager.folder / "step_000002")
    shutil.rmtree(manager.folder / "step_000003")
    with pytest.raises(CheckpointError, match="there is no whole checkpoint beside it"):
        manager.open(manager.folder / "step_000002")
    with pytest.raises(CheckpointError, match="none of its checkpoints is whole"):
        manager.open(manager.output_dir)


def test_a_checkpoint_may_be_copied_under_another_name(manager: CheckpointManager) -> None:
    save(manager, 3)
    best = manager.output_dir / "best"
    shutil.copytree(manager.folder / "step_000003", best)
    assert is_checkpoint(best)
    assert open_checkpoint(best).step == 3


@pytest.mark.parametrize("text", ["[1]", '{"loss": NaN}', '{"a": 1', "\x80", "[" * 100_000])
def test_state_that_is_no_json_object_is_refused(manager: CheckpointManager, text: str) -> None:
    save(manager, 1)
    path = manager.folder / "step_000001"
    (path / "state.json").write_text(text, encoding="latin-1")
    checkpoint = CheckpointManager(manager.output_dir, verify="size").open
    with pytest.raises(CheckpointError, match=r"state\.json"):
        checkpoint(path).state()


def test_state_that_json_cannot_say_is_an_error_before_anything_is_written(
    manager: CheckpointManager,
) -> None:
    save(manager, 1)
    for bad in ({"loss": float("inf")}, {"w": torch.ones(1)}):
        with pytest.raises((ValueError, TypeError)):
            manager.save(2, writer(2.0), bad)
    assert names(manager) == ["step_000001"]


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), CheckpointError("no")])
def test_a_writer_that_raises_leaves_no_trace(manager: CheckpointManager, error: BaseException) -> None:
    save(manager, 1)

    def write(folder: Path) -> None:
        writer(2.0)(folder)
        raise error

    with pytest.raises(type(error)):
        manager.save(2, write, {})
    assert names(manager) == ["step_000001"]


def test_leftovers_of_earlier_runs_are_removed_whatever_process_has_their_pid(
    manager: CheckpointManager,
) -> None:
    """This run holds the folder's lock: its makers are gone, and their pids may be of another host."""
    for pid in (1, os.getppid(), os.getpid()):
        (manager.folder / f".step_000002.writing-{pid}").mkdir(parents=True)
        (manager.folder / f".step_000001.deleting-{pid}" / "x").mkdir(parents=True)
    (manager.folder / ".step_000002.writing-me").mkdir()
    (manager.folder / ".hidden-12").mkdir()
    save(manager, 2)
    assert names(manager) == [".hidden-12", ".step_000002.writing-me", "step_000002"]


def test_a_kill_while_a_step_is_replaced_loses_nothing(manager: CheckpointManager) -> None:
    save(manager, 5)
    (manager.folder / "step_000005").rename(manager.folder / f".step_000005.replaced-{os.getppid()}")
    latest = manager.latest()
    assert latest is not None
    assert value_of(latest.path) == 5.0
    assert names(manager) == ["step_000005"]


def test_a_save_in_the_background_holds_the_values_of_its_moment(manager: CheckpointManager) -> None:
    tensor = torch.zeros(50, 3)
    go = threading.Event()
    saving = TensorSave({"w": tensor}, copy=True)

    def write(folder: Path) -> None:
        assert go.wait(30)
        saving.finish(folder, lambda: saving.write(folder))

    state = {"step": 1}
    path = manager.save(1, write, state, background=True)
    state["step"] = 2
    tensor.fill_(9.0)
    assert not path.exists()
    assert manager.latest() is None  # and the folder being written is left alone
    go.set()
    assert manager.wait() == path
    assert value_of(path) == 0.0
    assert manager.open(path).state() == {"step": 1}
    assert manager.wait() is None


def test_an_error_in_the_background_surfaces_at_the_next_save_and_when_waited_for(
    manager: CheckpointManager,
) -> None:
    def write(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    manager.save(1, write, {}, background=True)
    with pytest.raises(RunFailed, match="checkpoint of step 1 .*No space left"):
        manager.save(2, writer(2.0), {})
    manager.save(2, write, {}, background=True)
    with pytest.raises(RunFailed, match="checkpoint of step 2"):
        manager.wait()
    assert manager.wait() is None
    assert names(manager) == []


FULL_DISK = """
import json, resource, signal, sys
from pathlib import Path
import torch
from collie_core.checkpoint.manager import CheckpointManager
from collie_core.checkpoint.store import save_tensors
from collie_core.errors import RunFailed

manager = CheckpointManager(sys.argv[1])
write = lambda size: lambda folder: save_tensors({"w": torch.ones(size)}, folder)
manager.save(1, write(1000), {"step": 1})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the kernel then fails the write, as on a full disk
messages = []
for limit, size in ((200_000, 1_000_000), (50, 10), (300, 10), (4200, 1030)):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        manager.save(2, write(size), {"step": 2, "filling": "x" * limit})
    except RunFailed as error:
        messages.append(str(error))
print(json.dumps(messages))
"""


def test_a_full_disk_while_saving_loses_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    messages = json.loads(done.stdout)
    assert len(messages) == 4
    for message in messages:
        assert f"checkpoint of step 2 could not be written to {tmp_path / 'checkpoints'}" in message
        assert "File too large" in message
        assert "GiB free" in message
        assert f"{tmp_path / 'checkpoints' / 'step_000001'} stays as it was" in message
    assert os.listdir(tmp_path / "checkpoints") == ["step_000001"]
    latest = CheckpointManager(tmp_path).latest()
    assert latest is not None
    state: dict[str, Tensor] = {"w": torch.zeros(1000)}
    load_tensors(state, latest.path)
    assert state["w"].min() == 1.0
