"""A checkpoint written under any layout goes on under any other as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from layout_jobs import LAYOUTS, Training, base_config, run_job
from training_helpers import largest_difference, losses, metrics, weights

SAVED_AFTER, STEPS = 3, 6
CHOSEN = (
    "single",
    "dp2_zero0",
    "dp2_zero3",
    "tp2_sp",
    "pp2",
    "pp2_interleaved",
    "tp2_pp2",
    "dp2_tp2",
)
METHODS: tuple[dict[str, Any], ...] = (
    {"name": "adalomo", "lr": 1e-4},
    {"name": "adamw", "lr": 1e-4},
    {"name": "lomo", "lr": 0.05, "clip_grad_norm": 0.5},
)


@pytest.fixture(scope="module")
def model(make_llama: Callable[..., Path]) -> Path:
    return make_llama(vocab_size=251, tie_word_embeddings=True)


def config(
    model: Path, data: Path, out: Path, layout: str, method: dict[str, Any], **changes: Any
) -> dict[str, Any]:
    """Six steps over two epochs of packed records, with a checkpoint after three."""
    sections: dict[str, Any] = {
        "optimizer": method,
        "data": {"packing": True, "max_length": 96},
        "train": {"max_steps": STEPS, "epochs": 9},
        "checkpoint": {"every_steps": SAVED_AFTER, "keep": 9, "async_save": layout in ("dp2_zero3", "pp2")},
    }
    for key, value in changes.items():
        sections[key] = {**sections.get(key, {}), **value}
    return base_config(model, data, out, layout, **sections)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, model: Path, token_data: Path) -> Path:
    """Whole runs of every chosen layout with every method, each with a checkpoint half-way."""
    folder = tmp_path_factory.mktemp("saved")
    for layout in CHOSEN:
        trainings = [
            Training(
                config(model, token_data, folder / layout / method["name"], layout, method), ["tokenizer"]
            )
            for method in METHODS
        ]
        run_job(folder / layout, layout, trainings)
    return folder


def checkpoint(saved: Path, layout: str, method: str) -> Path:
    return saved / layout / method / "checkpoints" / f"step_{SAVED_AFTER:06d}"


@pytest.mark.parametrize("layout", CHOSEN)
def test_a_checkpoint_of_any_layout_goes_on_under_this_one(
    layout: str, saved: Path, model: Path, token_data: Path, tmp_path: Path
) -> None:
    trainings = {}
    for number, source in enumerate(CHOSEN):
        method = METHODS[(number + CHOSEN.index(layout)) % len(METHODS)]
        changes = {"checkpoint": {"resume": str(checkpoint(saved, source, method["name"]))}}
        trainings[source, method["name"]] = Training(
            config(model, token_data, tmp_path / source, layout, method, **changes), ["tokenizer"]
        )
    run_job(tmp_path, layout, list(trainings.values()))
    problems = []
    for (source, method), training in trainings.items():
        whole = saved / layout / method
        assert [line["step"] for line in metrics(training.out)] == [4, 5, 6]
        expected = losses(whole)[SAVED_AFTER:]
        if losses(training.out) != pytest.approx(expected, rel=2e-6):
            problems.append(f"{source}, {method}: losses {losses(training.out)} are not {expected}")
        difference = largest_difference(weights(whole), weights(training.out))
        if difference > (0.0 if source == layout else 1e-6):
            problems.append(f"{source}, {method}: weights differ by {difference}")
        if source == layout and losses(training.out) != expected:
            problems.append(f"{source}, {method}: not bit-identical on the same layout")
    assert not problems, "\n".join(problems)


def test_exports_of_all_layouts_are_alike_and_so_are_exports_of_their_checkpoints(
    saved: Path, tmp_path: Path
) -> None:
    for layout in ("dp2_zero3", "tp2_pp2"):
        last = saved / layout / "lomo" / "checkpoints" / f"step_{STEPS:06d}"
        out = tmp_path / layout / "model"
        done = subprocess.run(
            [sys.executable, "-m", "collie_core", "export", str(last), str(out)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert largest_difference(weights(tmp_path / layout), weights(saved / layout / "lomo")) == 0.0


def test_a_rank_killed_in_a_save_leaves_the_checkpoint_before_it(
    model: Path, token_data: Path, tmp_path: Path
) -> None:
    """The killed rank sleeps while it writes its file; resume then takes the earlier checkpoint."""
    out = tmp_path / "run"
    method = METHODS[0]
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, sys, time\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import layout_jobs\n"
        "from collie_core.checkpoint.store import TensorSave\n"
        "write = TensorSave.write\n"
        "def slow(self, folder):\n"
        "    if 'step_000004' in folder.name and os.environ['RANK'] == '1':\n"
        f"        open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "        time.sleep(60)\n"
        "    return write(self, folder)\n"
        "TensorSave.write = slow\n"
        "layout_jobs.main(layout_jobs.Path(sys.argv[1]))\n"
    )
    settings = config(model, token_data, out, "dp2_zero3", method, checkpoint={"every_steps": 2})
    job = Training(settings, ["tokenizer"])
    (tmp_path / "job.json").write_text(
        __import__("json").dumps([{"config": job.config, "actions": job.actions}])
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.Popen(
        [*command, str(script), str(tmp_path / "job.json")],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 90
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    process.communicate(timeout=90)
    assert process.returncode != 0
    assert [path.name for path in sorted((out / "checkpoints").glob("step_*"))] == ["step_000002"]
    run_job(tmp_path / "again", "dp2_zero3", [job])
    assert [line["step"] for line in metrics(out)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("layout", ["dp2_tp2"])
def test_every_rank_reads_only_its_part(layout: str, tmp_path: Path, make_llama: Callable[..., Path]) -> None:
    """A checkpoint of 1 GB: no rank's resident memory grows by as much as 0.6 GB while it loads."""
    found = tmp_path / "memory"
    script = tmp_path / "load.py"
    script.write_text(
        "import resource, sys, json\n"
        "from pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import torch, layout_jobs\n"
        "from collie_core import CollieConfig, Trainer\n"
        "from collie_core.launch.world import current_world\n"
        "from collie_core.train.setup import open_training\n"
        "from collie_core.layouts import distribute\n"
        "torch.set_num_threads(1)\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "config = json.loads(Path(sys.argv[1]).read_text())\n"
        "from collie_core.layouts.native import NativeLayout\n"
        "trainer = Trainer(CollieConfig(**config), tokenizer=layout_jobs._tokenizer())\n"
        "before = {}\n"
        "prepare = NativeLayout.prepare\n"
        "def measured(self, *arguments):\n"
        "    before['peak'] = peak()\n"
        "    prepare(self, *arguments)\n"
        "    before['grown'] = peak() - before['peak']\n"
        "NativeLayout.prepare = measured\n"
        "with open_training(trainer) as session:\n"
        "    pass\n"
        "Path(sys.argv[2] + f'_{current_world().rank}').write_text(str(before['grown']))\n"
    )
    model = make_llama(
        vocab_size=4096, hidden_size=1024, intermediate_size=4096, num_attention_heads=8, num_hidden_layers=16
    )
    size = (model / "model.safetensors").stat().st_size
    assert size > 0.9e9
    data = tmp_path / "data.jsonl"
    data.write_text('{"tokens": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}\n' * 8)
    import json

    (tmp_path / "config.json").write_text(
        json.dumps(base_config(model, data, tmp_path / "out", layout, optimizer={"name": "lomo", "lr": 0.1}))
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [
            *command,
            f"--nproc-per-node={LAYOUTS[layout][0]}",
            str(script),
            str(tmp_path / "config.json"),
            str(found),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    grown = [int(Path(f"{found}_{rank}").read_text()) for rank in range(4)]
    assert max(grown) < 0.6e9, grown
    assert max(grown) >= size / 4 * 0.9  # it is really there
