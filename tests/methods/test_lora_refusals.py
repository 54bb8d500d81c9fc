"""What LoRA refuses, each with one message that names the cause."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_runs import adapter_of, lora_config
from safetensors.torch import load_file, save_file
from training_helpers import config

from collie_core import AutoModelForCausalLM, Trainer
from collie_core.cli.main import main
from collie_core.errors import UserError
from collie_core.train.setup import check_run

TWICE = [{"adapter_name": "a"}, {"adapter_name": "a"}]
OVER_DORA = [{"use_dora": True}, {"adapter_name": "b"}]
PARTITIONED = {"layout": {"name": "deepspeed", "zero_stage": 3}}
BY_DISTRIBUTION = {"layout": {"name": "collie-deepspeed:deepspeed", "zero_stage": 3}}


@pytest.mark.parametrize(
    ("sections", "changes", "message"),
    [
        ([{"target_modules": "q_porj"}], {}, "fits no linear of the model's blocks, did you mean 'q_proj'"),
        ([{"target_modules": "lm_head"}], {}, "fits no linear of the model's blocks"),
        (TWICE, {}, "adapter_name: 'a' is the name of two adapters"),
        (OVER_DORA, {}, "DoRA rescales the whole weight, so no other adapter may be there"),
        ([{"init_lora_weights": "pissa", "r": 33}], {}, "r: 33 is above the 32 singular values of"),
        ([{"init_lora_weights": "olora"}], {}, "init_lora_weights: expected default or gaussian or pissa or"),
        ([{"init_lora_weights": "pisa"}], {}, "got 'pisa', did you mean 'pissa'?"),
        ([{"target_modules": []}], {}, "target_modules: names no linear"),
        ([{"rank": 3}], {}, "adapters.0.rank: unknown key"),
        ([{}], {"train": {"trainable": ["*norm*"]}}, "which is frozen: adapters train their own parameters"),
        ([{"use_dora": True}], BY_DISTRIBUTION, "set layout to {name: native, zero_stage: 3}"),
        ([{"use_dora": True}], PARTITIONED, "set layout to {name: native, zero_stage: 3}"),
        ([{"name": "lora", "path": "x"}], {}, "x: no folder of an adapter"),
    ],
)
def test_a_config(
    sections: list[dict[str, Any]],
    changes: dict[str, Any],
    message: str,
    tiny_llama: Path,
    data_file: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Trainer(lora_config(tiny_llama, data_file, tmp_path / "run", *sections, **changes)).train()
    lines = str(caught.value).splitlines()
    assert len(lines) == len(set(lines)), "told twice"
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, data: Path) -> Path:
    out = tmp_path_factory.mktemp("adapter") / "run"
    return adapter_of(Trainer(lora_config(tiny_llama, data, out, train={"max_steps": 1})).train())


@pytest.fixture
def copied(adapter: Path, tmp_path: Path) -> Path:
    """A copy of the adapter's folder, to be damaged."""
    folder = tmp_path / "copied"
    folder.mkdir()
    for file in adapter.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def changed(key: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))

    return change


def renamed(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors = {name.replace("layers.1.", "layers.7."): t for name, t in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")


def resized(folder: Path) -> None:
    tensors = {n: t[:, :5].contiguous() for n, t in load_file(folder / "adapter_model.safetensors").items()}
    save_file(tensors, folder / "adapter_model.safetensors")


def emptied(folder: Path) -> None:
    tensors = {n: torch.empty(0, 4) for n in load_file(folder / "adapter_model.safetensors")}
    save_file(tensors, folder / "adapter_model.safetensors")


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    torch.save({}, folder / "adapter_model.bin")


def truncated(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (changed("peft_type", "IA3"), "'ia3'"),
        (changed("peft_type", None), "adapter_config.json: peft_type: expected a name, got None"),
        (changed("base_model_name_or_path", "/no/such/model"), "base_model_name_or_path: /no/such/model"),
        (changed("modules_to_save", ["lm_head"]), "modules_to_save: .* is not supported"),
        (changed("bias", "all"), "bias: 'all' is not supported"),
        (renamed, "fits no linear of the model's blocks, did you mean"),
        (resized, "has shape .*, the model asks for"),
        (emptied, "holds no values"),
        (pickled, "adapter_model.bin: is not read"),
        (truncated, "adapter_model.safetensors: cannot be read"),
    ],
)
def test_a_folder(damage: Callable[[Path], None], message: str, copied: Path) -> None:
    damage(copied)
    with pytest.raises(UserError, match=message):
        AutoModelForCausalLM.from_pretrained(copied)


def test_training_on_top_of_an_adapter(adapter: Path, data_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.path: has adapters: name its base model here"):
        Trainer(config(adapter, data_file, tmp_path / "run")).train()


def test_commands(
    adapter: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        ([str(tiny_llama), str(tmp_path / "a"), "--merge"], "--merge: it has no adapters"),
        ([str(adapter), str(tmp_path / "b"), "--as", "llama"], "merge them with --merge"),
        ([str(adapter), str(adapter)], "expected a new or empty folder"),
    ):
        assert main(["export", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"r": 8}, "r: is 8, but {} has 4; leave it out"),  # the default, though written
        ({"lora_alpha": 8}, "lora_alpha: is 8.0, but {} has 16; leave it out"),
        ({"use_dora": True}, "use_dora: is True, but {} has False; leave it out"),
        ({"init_lora_weights": "default"}, "init_lora_weights: is 'default', but of a new adapter alone"),
    ],
)
def test_an_option_beside_path_that_differs(
    option: dict[str, Any], message: str, adapter: Path, tiny_llama: Path, data_file: Path, tmp_path: Path
) -> None:
    section = {"name": "lora", "path": str(adapter), **option}
    with pytest.raises(UserError, match=re.escape(message.format(adapter))):
        check_run(lora_config(tiny_llama, data_file, tmp_path / "run", section))


def test_other_modules_beside_path(adapter: Path, tiny_llama: Path, data_file: Path, tmp_path: Path) -> None:
    section = {"name": "lora", "path": str(adapter), "target_modules": "attention"}
    with pytest.raises(UserError, match=f"target_modules: is 'attention', but {adapter} has .*'down_proj'"):
        Trainer(lora_config(tiny_llama, data_file, tmp_path / "run", section)).train()


@pytest.mark.parametrize(
    "options", [{}, {"r": 4, "lora_alpha": 16, "use_dora": False, "target_modules": "all-linear"}]
)
def test_an_adapter_goes_on_with_its_own_options_written_or_not(
    options: dict[str, Any], adapter: Path, tiny_llama: Path, data_file: Path, tmp_path: Path
) -> None:
    section = {"name": "lora", "path": f"{adapter}/", **options}
    run = lora_config(tiny_llama, data_file, tmp_path / "run", section, train={"max_steps": 1})
    result = adapter_of(Trainer(run).train())
    assert json.loads((result / "adapter_config.json").read_text())["r"] == 4


def test_a_run_folder_as_path_names_the_adapter_within(
    adapter: Path, tiny_llama: Path, data_file: Path, tmp_path: Path
) -> None:
    section = {"name": "lora", "path": str(adapter.parent)}
    with pytest.raises(UserError, match=f"no folder of an adapter.*did you mean {adapter}[?]"):
        Trainer(lora_config(tiny_llama, data_file, tmp_path / "run", section)).train()
