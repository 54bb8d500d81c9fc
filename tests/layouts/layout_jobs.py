"""Jobs of several processes for the layout tests: one process group runs many trainings.

As a script, under torchrun: `layout_jobs.py JOB.json` runs every training of the job, one after the other.
Without an argument it serves: it imports what ranks need once, and forks them for each job.
"""

from __future__ import annotations

import faulthandler
import functools
import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: what takes long to import and ranks need, where it is installed
PRELOADED = (
    "collie_core.data.build",
    "collie_core.layouts.distribute",
    "collie_core.layouts.native",
    "collie_core.layouts.zero",
    "collie_core.train.loop",
    "collie_core.train.output",
    "collie_core.train.setup",
    "peft",  # with bitsandbytes, which compiles when it is imported
    "torch._dynamo",
    "torch._inductor.standalone_compile",
    "transformers.tokenization_utils_tokenizers",
)

#: name -> (processes, keys of the config).  Two rows a step on each of two ranks are four on one.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "offload": (1, {"layout": {"zero_stage": 3, "offload": "cpu"}}),
    "dp2_zero0": (2, {"dp_size": 2}),
    "dp2_zero1": (2, {"dp_size": 2, "layout": {"zero_stage": 1}}),
    "dp2_zero2": (2, {"dp_size": 2, "layout": {"zero_stage": 2}}),
    "dp2_zero3": (2, {"dp_size": 2, "layout": {"zero_stage": 3}}),
    "dp2_offload": (2, {"dp_size": 2, "layout": {"zero_stage": 3, "offload": "cpu"}}),
    "tp2": (2, {"tp_size": 2, "layout": {"sequence_parallel": False}}),
    "tp2_sp": (2, {"tp_size": 2}),
    "pp2": (2, {"pp_size": 2}),
    "pp2_gpipe": (2, {"pp_size": 2, "layout": {"pp_schedule": "gpipe", "pp_microbatches": 3}}),
    "pp2_interleaved": (2, {"pp_size": 2, "layout": {"pp_schedule": "interleaved"}}),
    "tp2_pp2": (4, {"tp_size": 2, "pp_size": 2}),
    "dp2_tp2": (4, {"dp_size": 2, "tp_size": 2, "layout": {"zero_stage": 3}}),
    "dp2_pp2": (4, {"dp_size": 2, "pp_size": 2}),
    "dp2_pp2_zero2": (4, {"dp_size": 2, "pp_size": 2, "layout": {"zero_stage": 2}}),
    "dp2_tp2_pp2": (8, {"dp_size": 2, "tp_size": 2, "pp_size": 2, "layout": {"zero_stage": 2}}),
}
#: those of a test or two
UNUSUAL: dict[str, tuple[int, dict[str, Any]]] = {"tp3": (3, {"tp_size": 3}), "tp4": (4, {"tp_size": 4})}


@dataclass
class Training:
    """One training of a job.  config: keys of the YAML.  actions: what else the ranks do before it, or
    `call FUNCTION`: one of rank_calls.py, in its place."""

    config: dict[str, Any]
    actions: list[str] = field(default_factory=list)

    @property
    def out(self) -> Path:
        """Its output folder."""
        return Path(self.config["output_dir"])


def base_config(model: Path, data: Path, out: Path, layout: str, /, **changes: Any) -> dict[str, Any]:
    """A training of five steps of eight rows under a layout, with the same global batch under each."""
    sizes = (LAYOUTS | UNUSUAL)[layout][1]
    rows = 4 // sizes.get("dp_size", 1)
    config: dict[str, Any] = {
        "model": {"path": str(model), "dtype": "float32"},
        "schedule": {"name": "constant"},
        "data": {"train": str(data), "max_length": 64},
        "train": {
            "micro_batch_size": rows,
            "gradient_accumulation_steps": 2,
            "max_steps": 5,
            "compile": False,
        },
        "monitors": [],
        "output_dir": str(out),
        **sizes,
    }
    for key, value in changes.items():
        merges = isinstance(value, dict) and isinstance(config.get(key), dict) and "name" not in value
        config[key] = {**config[key], **value} if merges else value
    return config


def run_job(folder: Path, layout: str, trainings: list[Training], timeout: float = 600) -> None:
    """Run every training under the layout's number of processes."""
    run_trainings(folder, (LAYOUTS | UNUSUAL)[layout][0], trainings, timeout)


def run_trainings(folder: Path, size: int, trainings: list[Training], timeout: float = 600) -> None:
    """Run every training as so many processes, forked from the server of this test process."""
    import pytest
    import torch
    from torch.distributed import TCPStore

    if 0 < torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} CUDA devices, or none")

    folder.mkdir(parents=True, exist_ok=True)
    job, log = folder / "job.json", folder / "job.log"
    job.write_text(json.dumps([{"config": t.config, "actions": t.actions} for t in trainings]))
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    order = {"job": str(job), "size": size, "port": store.port, "log": str(log), "timeout": timeout}
    server = _server()
    assert server.stdin and server.stdout
    server.stdin.write(json.dumps(order) + "\n")
    server.stdin.flush()
    statuses = json.loads(server.stdout.readline() or "[-1]")
    assert not any(statuses), f"{statuses}\n{_told(log)}"


def _told(log: Path) -> str:
    """Where a rank crashed, if one did, and the end of what all said."""
    text = log.read_text()
    crash = text.find("Fatal Python error")
    return (text[crash : crash + 4000] + "\n...\n" if crash >= 0 else "") + text[-4000:]


@functools.cache
def _server() -> subprocess.Popen[str]:
    """The process that ranks are forked from; it ends with this one, which has the other end of its pipe."""
    return subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def replicas_callback(path: Path) -> Any:
    """A callback that writes the digest of every rank's box of every parameter."""
    import torch

    from collie_core.plugin import Run, hookimpl
    from collie_core.together import gather

    class Digests:
        @hookimpl
        def collie_run_end(self, run: Run) -> None:
            mine = {}
            for name, shard in run.shards.items():
                local = shard.local.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                digest = hashlib.sha256(local.numpy().tobytes()).hexdigest()
                mine[name] = [list(shard.offsets), list(shard.local.shape), digest]
            everyone = gather(mine, run.control)
            if run.first:
                path.write_text(json.dumps(everyone))

    return Digests()


def unequal_replicas(path: Path) -> list[str]:
    """Parameters of which two ranks hold the same box with different bits."""
    seen: dict[str, str] = {}
    unequal = []
    for rank in json.loads(path.read_text()):
        for name, (offsets, sizes, digest) in rank.items():
            key = f"{name}@{offsets}{sizes}"
            if seen.setdefault(key, digest) != digest:
                unequal.append(key)
    return unequal


def copies(path: Path) -> int:
    """How many boxes more than one rank holds."""
    boxes = [
        f"{name}@{offsets}{sizes}"
        for rank in json.loads(path.read_text())
        for name, (offsets, sizes, _) in rank.items()
    ]
    return sum(boxes.count(box) > 1 for box in set(boxes))


def _train(config: dict[str, Any], actions: list[str]) -> None:
    from collie_core import CollieConfig, Trainer
    from collie_core.train.setup import open_training

    out = Path(config["output_dir"])
    out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer() if "tokenizer" in actions else None
    trainer = Trainer(
        CollieConfig(**config),
        tokenizer=tokenizer,
        callbacks=[replicas_callback(out.with_suffix(".replicas.json"))],
    )
    if {"export", "generate"} & set(actions):
        with open_training(trainer) as session:
            _before(session, actions, out)
    trainer.train()


def _before(session: Any, actions: list[str], out: Path) -> None:
    """Write the tensors as they were loaded, and greedy tokens, before any training."""
    import torch
    from safetensors.torch import save_file

    first = session.run.first
    if "export" in actions:
        tensors = {name: tensor.clone() for name, tensor in session.layout.full_tensors()}
        if first:
            save_file(tensors, out.with_suffix(".loaded.safetensors"))
    if "generate" in actions:
        ids = torch.tensor([[5, 9, 33, 7, 12], [0, 0, 41, 8, 77]])
        mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
        found = session.layout.generate(ids, attention_mask=mask, max_new_tokens=7, eos_token_id=-1)
        drawn = session.layout.generate(ids[:1], max_new_tokens=7, eos_token_id=-1, do_sample=True, seed=3)
        if first:
            out.with_suffix(".tokens.json").write_text(json.dumps([found.tolist(), drawn.tolist()]))


def _tokenizer() -> Any:
    """Any tokenizer: the records are tokens already, but a run has one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<unk>": 1, "</s>": 2} | {f"word{number}": number for number in range(3, 240)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def main(job: Path) -> None:
    """Run the trainings of a job as the rank that the environment says."""
    import torch

    from collie_core.launch.world import (
        close_process_group,
        current_world,
        local_device,
        open_process_group,
    )

    torch.set_num_threads(1)
    world = current_world()
    open_process_group(world, local_device(world), 120.0)
    try:
        for training in json.loads(job.read_text()):
            calls = [a.removeprefix("call ") for a in training["actions"] if a.startswith("call ")]
            for name in calls:
                getattr(importlib.import_module("rank_calls"), name)(training["config"])
            if not calls:
                _train(training["config"], training["actions"])
    except BaseException:
        traceback.print_exc()  # before the process leaves the others
        raise
    finally:
        close_process_group()


def serve() -> None:
    """Fork the ranks of each job that a line of the standard input describes; print their exit statuses."""
    # peft imports bitsandbytes, which begins to use a CUDA device: ranks forked after that could not
    with_device = Path("/dev/nvidiactl").exists()
    for module in PRELOADED:
        if module == "peft" and with_device:
            continue
        with suppress(ModuleNotFoundError):
            importlib.import_module(module)
    for line in sys.stdin:
        order = json.loads(line)
        ranks = {_fork(order, rank): rank for rank in range(order["size"])}
        statuses: dict[int, int] = {}
        deadline = time.monotonic() + order["timeout"]
        while len(statuses) < len(ranks):
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                statuses[pid] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                for left in ranks.keys() - statuses.keys():
                    os.kill(left, signal.SIGABRT)  # it says where it is
                deadline = float("inf")
            else:
                time.sleep(0.01)
        print(json.dumps(list(statuses.values())), flush=True)


def _fork(order: dict[str, Any], rank: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        faulthandler.enable()
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(order["size"]),
            LOCAL_WORLD_SIZE=str(order["size"]),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(order["port"]),
            TORCHELASTIC_USE_AGENT_STORE="True",
        )
        main(Path(order["job"]))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main(Path(sys.argv[1])) if len(sys.argv) > 1 else serve()
