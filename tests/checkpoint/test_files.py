"""Atomic writes and the lock on an output folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from collie_core.errors import UserError
from collie_core.files import OutputLock, free_space, write_json_atomic, write_text_atomic


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    write_text_atomic(path, "old")
    write_text_atomic(path, "né")
    assert path.read_bytes() == "né".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_keeps_the_old_contents(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_json_atomic(path, {"step": 1})
    for bad in ({"loss": float("nan")}, {"path": tmp_path}):
        with pytest.raises((ValueError, TypeError)):
            write_json_atomic(path, bad)
    with pytest.raises(UnicodeEncodeError):
        write_text_atomic(path, "\udc80")
    assert json.loads(path.read_text()) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_free_space_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert (
        0
        < free_space(tmp_path / "runs" / "demo")
        <= os.statvfs(tmp_path).f_blocks * os.statvfs(tmp_path).f_frsize
    )


HOLDER = """
import sys, time
from collie_core.files import OutputLock
with OutputLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "demo"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError) as caught, OutputLock(folder):
            pass
        assert f"{folder} is in use" in str(caught.value)
        assert f"process {holder.pid} on host {os.uname().nodename}" in str(caught.value)
        assert caught.value.exit_status == 2
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with OutputLock(folder):  # the lock of a killed process is gone with it
        pass


def test_the_lock_is_free_again_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), OutputLock(tmp_path):
        raise RuntimeError
    with OutputLock(tmp_path):
        pass


def test_within_a_process_too_only_one_holds_it(tmp_path: Path) -> None:
    with OutputLock(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()}"):
        OutputLock(tmp_path).acquire()
