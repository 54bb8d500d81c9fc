"""What the DeepSpeed layout refuses, and that `ds_config` must agree with the run; nothing is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from training_helpers import config

from collie_core.errors import CollieError
from collie_core.train.setup import check_run

pytest.importorskip("deepspeed")


def refused(**changes: Any) -> str:
    """The message with which a config is refused."""
    layout = {"name": "deepspeed", **changes.pop("layout", {})}
    base: dict[str, Any] = {"optimizer": {"name": "adamw", "lr": 1e-4, "clip_grad_norm": 0.5}}
    with pytest.raises(CollieError) as caught:
        check_run(config(Path("model"), Path("data"), Path("out"), **{**base, **changes, "layout": layout}))
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tp_size": 2}, ["tp_size 2", "native"]),
        ({"pp_size": 2}, ["pp_size 2", "native"]),
        (
            {"optimizer": {"name": "lomo", "lr": 0.1}, "layout": {"zero_stage": 3}},
            ["optimizer lomo", "layout: {name: native, zero_stage: 3}"],
        ),
        ({"optimizer": {"name": "lion"}}, ["optimizer lion", "no torch optimizer", "name: native"]),
        ({"optimizer": {"name": "adamw", "in_backward": True}}, ["optimizer adamw", "name: native"]),
        (
            {"optimizer": {"name": "adamw", "state_dtype": "bfloat16"}},
            ["optimizer adamw with optimizer.state_dtype", "set it to float32"],
        ),
        ({"optimizer": {"name": "adafactor", "lr": 1e-3}}, ["optimizer adafactor", "zero_stage to 0"]),
        ({"optimizer": {"name": "adagrad", "lr": 1e-3}}, ["optimizer adagrad", "zero_stage to 0 or 3"]),
        ({"optimizer": {"name": "adamw", "lr": 1e-3, "clip_grad_value": 1.0}}, ["optimizer.clip_grad_value"]),
        ({"checkpoint": {"async_save": True}}, ["checkpoint.async_save", "set it to false"]),
        ({"train": {"compile": True}}, ["train.compile", "set it to false"]),
        ({"model": {"path": "m", "dtype": "float16"}}, ["model.dtype float16", "bfloat16"]),
        ({"model": {"path": "m", "dtype": "bfloat16"}, "layout": {"zero_stage": 0}}, ["zero_stage to 1"]),
        ({"layout": {"zero_stage": 0, "offload": "cpu"}}, ["layout.offload cpu", "zero_stage to 1"]),
        ({"ops": {"cross_entropy": "chunked"}, "layout": {"zero_stage": 3}}, ["chunked", "plain"]),
        ({"layout": {"zero_stage": 4}}, ["zero_stage", "4"]),
        ({"layout": {"zero_stag": 2}}, ["zero_stag", "zero_stage"]),
    ],
)
def test_refused_combinations(changes: dict[str, Any], words: list[str]) -> None:
    message = refused(**changes)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("ds_config", "words"),
    [
        ({"train_micro_batch_size_per_gpu": 3}, ["train_micro_batch_size_per_gpu 3", "micro_batch_size 4"]),
        ({"gradient_accumulation_steps": 7}, ["gradient_accumulation_steps 7", "makes it 1"]),
        ({"train_batch_size": 5}, ["train_batch_size 5", "makes it 4"]),
        ({"gradient_clipping": 1.0}, ["gradient_clipping 1.0", "optimizer.clip_grad_norm 0.5"]),
        ({"bf16": {"enabled": True}}, ["bf16.enabled true", "model.dtype float32"]),
        ({"fp16": {"enabled": True}}, ["fp16.enabled true", "model.dtype float32"]),
        ({"zero_optimization": {"stage": 3}}, ["zero_optimization.stage 3", "layout.zero_stage 2"]),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            ["offload_optimizer.device", "nvme", "layout.offload none"],
        ),
        ({"optimizer": {"type": "Adam"}}, ["optimizer 'Adam'", "optimizer.name 'adamw'"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler", "WarmupLR", "schedule:"]),
        ({"gradient_cliping": 0.5}, ["gradient_cliping", "gradient_clipping"]),
    ],
)
def test_a_ds_config_that_contradicts_names_both(ds_config: dict[str, Any], words: list[str]) -> None:
    message = refused(layout={"ds_config": ds_config})
    assert all(word in message for word in ["layout.ds_config", *words]), message


def test_a_ds_config_with_auto_or_equal_values_is_accepted() -> None:
    ds_config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": "auto", "reduce_bucket_size": "auto", "overlap_comm": False},
        "bf16": {"enabled": "auto"},
    }
    optimizer = {"name": "adamw", "lr": 1e-4, "clip_grad_norm": 0.5}
    layout = {"name": "deepspeed", "ds_config": ds_config}
    check_run(config(Path("m"), Path("d"), Path("o"), optimizer=optimizer, layout=layout))


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot be read"), ("{not json", "is no JSON"), (json.dumps([1]), "expected an object")],
)
def test_a_ds_config_that_cannot_be_read(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_text(content)
    message = refused(layout={"ds_config": str(path)})
    assert str(path) in message and words in message
