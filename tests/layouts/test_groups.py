"""Process groups of a run end with it: a process may train again and again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from layout_jobs import Training, base_config, run_job


def test_no_connection_stays_after_a_run(
    tmp_path: Path, make_llama: Callable[..., Path], data: Path
) -> None:
    sections = {"optimizer": {"name": "lomo"}, "train": {"max_steps": 1}}
    config = base_config(make_llama(), data, tmp_path / "runs", "dp2_zero0", **sections)
    run_job(tmp_path, "dp2_zero0", [Training(config, ["call train_again"])])
    for rank in (0, 1):
        open_sockets = json.loads((tmp_path / f"runs.{rank}.json").read_text())
        assert open_sockets[3] < open_sockets[0] + 6  # two groups a run would be 12 more
