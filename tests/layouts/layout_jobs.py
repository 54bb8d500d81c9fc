"""Jobs of several processes for the layout tests: one process group runs many trainings.

As a script, under torchrun: `layout_jobs.py JOB.json` runs every training of the job, one after the other.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

#: name -> (processes, keys of the config).  Two rows a step on each of two ranks are four on one.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
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


@dataclass
class Training:
    """One training of a job.  config: keys of the YAML.  actions: what else the ranks do before it."""

    config: dict[str, Any]
    actions: list[str] = field(default_factory=list)

    @property
    def out(self) -> Path:
        """Its output folder."""
        return Path(self.config["output_dir"])


def base_config(model: Path, data: Path, out: Path, layout: str, /, **changes: Any) -> dict[str, Any]:
    """A training of five steps of eight rows under a layout, with the same global batch under each."""
    sizes = LAYOUTS[layout][1]
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
    folder.mkdir(parents=True, exist_ok=True)
    job = folder / "job.json"
    job.write_text(json.dumps([{"config": t.config, "actions": t.actions} for t in trainings]))
    command = [sys.executable, str(HERE / "layout_jobs.py"), str(job)]
    if LAYOUTS[layout][0] > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={LAYOUTS[layout][0]}"]
        command[1:1] = launch
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-4000:]


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


def main() -> None:
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
    for training in json.loads(Path(sys.argv[1]).read_text()):
        _train(training["config"], training["actions"])
    close_process_group()


if __name__ == "__main__":
    main()
