"""SIGKILL at random moments of a loop that saves: there is always a whole checkpoint, as it was written."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from collie_core.checkpoint.manager import CheckpointManager
from collie_core.checkpoint.store import stream_tensors

KILLS = 20

# Forks a child for each line of its input; the child saves for ever and reports every finished step.
SAVE_LOOP = """
import os, sys
import torch
from collie_core.checkpoint.manager import CheckpointManager
from collie_core.checkpoint.store import save_tensors

torch.set_num_threads(1)

def state(step):
    return {f"w{i}": torch.full((200 + i, 100), step * 10.0 + i) for i in range(5)}

def save_for_ever(output_dir):
    manager = CheckpointManager(output_dir)
    latest = manager.latest()
    step = latest.step if latest else 0
    while True:
        step += 1
        for attempt in (1, 2):  # the second replaces the first
            write = lambda folder, tensors=state(step): save_tensors(tensors, folder)
            manager.save(step, write, {"step": step}, background=step % 3 == 0)
            manager.wait()
            print("saved", step, flush=True)

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        save_for_ever(sys.argv[1])
    print("child", child, flush=True)
    os.waitpid(child, 0)
    print("killed", child, flush=True)
"""


def run_and_kill(parent: subprocess.Popen[str], delay: float) -> int:
    """Start a child, kill it `delay` seconds after its first save; returns the last step that it reported."""
    assert parent.stdin is not None
    assert parent.stdout is not None
    print("go", file=parent.stdin, flush=True)
    word, child = parent.stdout.readline().split()
    assert word == "child"
    word, step = parent.stdout.readline().split()
    assert word == "saved"
    time.sleep(delay)
    os.kill(int(child), signal.SIGKILL)
    while (line := parent.stdout.readline().split())[0] == "saved":
        step = line[1]
    assert line == ["killed", child]
    return int(step)


def test_after_any_kill_the_newest_whole_checkpoint_holds_what_was_written(tmp_path: Path) -> None:
    moments = random.Random(0)
    command = [sys.executable, "-c", SAVE_LOOP, str(tmp_path)]
    unfinished = 0
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        for _ in range(KILLS):
            reported = run_and_kill(parent, moments.uniform(0, 0.15))
            unfinished += any(path.name.startswith(".") for path in (tmp_path / "checkpoints").iterdir())
            latest = CheckpointManager(tmp_path).latest()
            assert latest is not None
            assert latest.step >= reported  # what save returned from is on the disk
            assert latest.state() == {"step": latest.step}
            tensors = dict(stream_tensors(latest.path))
            assert len(tensors) == 5
            for i in range(5):
                expected = torch.full((200 + i, 100), latest.step * 10.0 + i)
                assert torch.equal(tensors[f"w{i}"], expected)
        assert parent.stdin is not None
        parent.stdin.close()
    assert unfinished > 0  # the kills did hit saves that were under way
