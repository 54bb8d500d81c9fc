"""From a config to a run: resized models, where a run goes on from, what is refused early."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from training_helpers import StopAt, config, largest_difference, losses, weights

from collie_core import AutoModelForCausalLM, Trainer
from collie_core.checkpoint.folder import read_state
from collie_core.cli.main import main
from collie_core.errors import ConfigError, UserError
from collie_core.plugin import Run, hookimpl
from collie_core.train.setup import open_training


def test_a_resized_model_is_trained_and_written(tiny_llama: Path, data_file: Path, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.resize_token_embeddings(331)
    cfg = config(tiny_llama, data_file, tmp_path / "out", train={"max_steps": 2})
    result = Trainer(cfg, model=model).train()
    assert result.model is not None
    assert json.loads((result.model / "config.json").read_text())["vocab_size"] == 331
    stock = LlamaForCausalLM.from_pretrained(result.model, dtype=torch.float32)
    assert stock.lm_head.weight.shape[0] == 331
    checkpoint = tmp_path / "out" / "checkpoints" / "step_000002"
    assert main(["export", str(checkpoint), str(tmp_path / "exported" / "model")]) == 0
    assert largest_difference(weights(tmp_path / "exported"), weights(tmp_path / "out")) == 0.0


def test_records_of_tokens_need_no_tokenizer(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, data = tmp_path / "model", tmp_path / "data.jsonl"
    shutil.copytree(tiny_llama, folder, ignore=shutil.ignore_patterns("*token*"))
    record = {"tokens": [5, 6, 7, 8, 9], "labels": [-100, 6, 7, 8, 9]}
    data.write_text("".join(json.dumps(record) + "\n" for _ in range(8)))
    result = Trainer(config(folder, data, tmp_path / "out")).train()
    assert result.model is not None and not list(result.model.glob("*token*"))
    again = config(folder, data, tmp_path / "out", train={"epochs": 2})
    assert Trainer(again).train().step == 2 * result.step  # from the checkpoint, which has none either
    with_one = Trainer(config(tiny_llama, data, tmp_path / "with", train={"epochs": 2}))
    with_one.train()
    assert losses(tmp_path / "out") == losses(tmp_path / "with")
    data.write_text('{"tokens": [5, 6, 5000]}\n')
    with pytest.raises(UserError, match="data.jsonl:1: .* 5000"):
        Trainer(config(folder, data, tmp_path / "beyond")).train()
    data.write_text('{"tokens": [5, 6]}\n{"text": "words"}\n')
    with pytest.raises(UserError, match=f"data.jsonl:2: a record of text needs a tokenizer, and {folder}"):
        Trainer(config(folder, data, tmp_path / "text")).train()


def test_what_is_no_config_and_no_model_is_refused(tiny_llama: Path, data_file: Path, tmp_path: Path) -> None:
    wrong: Any = "config.yaml"
    with pytest.raises(ConfigError, match="expected a CollieConfig .from_yaml reads a file., got str"):
        Trainer(wrong)
    with pytest.raises(ConfigError, match="expected a module, got str"):
        Trainer(config(tiny_llama, data_file, tmp_path / "out"), model=wrong)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": torch.nn.Module()}, "the module has no parameters"),
        ({"tokenizer": "folder"}, "expected a tokenizer, as AutoTokenizer reads one, got a path"),
        ({"callbacks": object()}, "expected a list of callbacks, got object"),
        ({"callbacks": [object]}, "object is a class; give an instance"),
    ],
)
def test_objects_of_another_kind_are_refused(
    given: dict[str, Any], message: str, tiny_llama: Path, data_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        Trainer(config(tiny_llama, data_file, tmp_path / "out"), **given)


def test_masks_and_labels_have_the_shape_of_the_ids(tiny_llama: Path) -> None:
    model, ids = AutoModelForCausalLM.from_pretrained(tiny_llama), torch.ones(1, 8, dtype=torch.int64)
    with pytest.raises(UserError, match=r"attention_mask: expected the shape of input_ids, \(1, 8\), got"):
        model(ids, attention_mask=torch.ones(1, 2))
    with pytest.raises(UserError, match=r"labels: expected the shape of input_ids, \(1, 8\), got \(1, 7\)"):
        model(ids, labels=ids[:, 1:])
    with pytest.raises(UserError, match=r"attention_mask: expected the shape of input_ids, \(1, 8\), got"):
        model.generate(ids, torch.ones(1, 2), max_new_tokens=1)


def test_a_model_that_could_not_be_written_is_refused_before_it_is_trained(
    tiny_llama: Path, data_file: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    name, parameter = next((n, p) for n, p in model.named_parameters() if p.ndim == 2)
    owner, _, leaf = name.rpartition(".")
    cut = torch.nn.Parameter(parameter.detach()[:-1].clone())
    setattr(model.get_submodule(owner), leaf, cut)
    with pytest.raises(ConfigError, match=f"{name} is .*, but the config of"):
        Trainer(config(tiny_llama, data_file, tmp_path / "out"), model=model).train()
    assert not (tmp_path / "out").exists()


def test_a_frozen_model_is_refused_and_is_trained_once_it_says_so(
    tiny_llama: Path, data_file: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).requires_grad_(False)
    trainer = Trainer(config(tiny_llama, data_file, tmp_path / "out", train={"max_steps": 1}), model=model)
    with pytest.raises(ConfigError, match=r"model: none of its parameters needs a gradient.*requires_grad_"):
        trainer.train()
    assert not (tmp_path / "out").exists()
    model.requires_grad_()
    assert trainer.train().step == 1


def test_a_checkpoint_of_another_run_is_where_a_run_begins_and_not_where_it_goes_on(
    tiny_llama: Path, data_file: Path, tmp_path: Path
) -> None:
    Trainer(config(tiny_llama, data_file, tmp_path / "one"), callbacks=[StopAt(3)]).train()
    first = tmp_path / "one" / "checkpoints" / "step_000003"
    cfg = config(tiny_llama, data_file, tmp_path / "two", checkpoint={"resume": str(first)})
    assert Trainer(cfg, callbacks=[StopAt(6)]).train().step == 6
    with open_training(Trainer(cfg)) as session:
        assert session.run.step == 6
    # a checkpoint of its own is what was asked for, each time
    Trainer(cfg, callbacks=[StopAt(8)]).train()
    own = tmp_path / "two" / "checkpoints" / "step_000006"
    with open_training(
        Trainer(config(tiny_llama, data_file, tmp_path / "two", checkpoint={"resume": str(own)}))
    ) as session:
        assert session.run.step == 6


def test_a_run_goes_on_when_the_model_that_it_began_with_is_gone(
    tiny_llama: Path, data_file: Path, tmp_path: Path
) -> None:
    Trainer(config(tiny_llama, data_file, tmp_path / "whole")).train()
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    cfg = config(base, data_file, tmp_path / "out", checkpoint={"every_steps": 2, "keep": 1})
    Trainer(cfg, callbacks=[StopAt(4)]).train()
    shutil.rmtree(base)
    Trainer(cfg).train()
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
    assert largest_difference(weights(tmp_path / "out"), weights(tmp_path / "whole")) == 0.0
    names = {path.name for path in (tmp_path / "whole" / "model").iterdir()}
    assert {path.name for path in (tmp_path / "out" / "model").iterdir()} == names


def test_what_a_finished_run_has_done_is_told_without_its_model(
    tiny_llama: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"eval": str(data_file)}
    cfg = config(tiny_llama, data_file, tmp_path / "out", data=data, train={"max_steps": 2})
    evaluation = Trainer(cfg).train().evaluation
    (tmp_path / "out" / "checkpoints" / "step_000002" / "state.json").touch()
    with open_training(Trainer(cfg)) as session:
        assert session.done and not hasattr(session.layout, "model")
    result = Trainer(cfg).train()
    assert result.step == 2 and result.model == tmp_path / "out" / "model"
    assert evaluation and result.evaluation == evaluation
    assert "has already done its 2 steps" in capsys.readouterr().err


def test_changed_recomputation_counts_on_resume(tiny_llama: Path, data_file: Path, tmp_path: Path) -> None:
    def resolved(**train: Any) -> Any:
        cfg = config(tiny_llama, data_file, tmp_path / "out", train=train, checkpoint={"every_steps": 1})
        with open_training(Trainer(cfg)) as session:
            return session.run.resolved["activation_checkpointing"]

    cfg = config(tiny_llama, data_file, tmp_path / "out")
    Trainer(cfg, callbacks=[StopAt(1)]).train()
    state = read_state(tmp_path / "out" / "checkpoints" / "step_000001")
    assert state["resolved"]["activation_checkpointing"] == "none"
    assert resolved(activation_checkpointing="full") == "full"
    assert resolved(activation_checkpointing=1) == 1
    assert resolved() == "none"


class Wait:
    """Holds a run where its output folder was found to be new and is not made yet."""

    def __init__(self, turn: Any) -> None:
        self.turn = turn

    @hookimpl
    def collie_check(self) -> list[str]:
        self.turn.wait()
        return []


def begin(model: Path, data: Path, out: Path, turn: Any, told: Any) -> None:
    """Open a run when the other one has come as far; say how that went."""
    try:
        with open_training(Trainer(config(model, data, out), callbacks=[Wait(turn)])) as session:
            session.start()
            told.put("begun")
    except UserError as error:
        told.put(str(error))


def test_of_two_runs_begun_together_in_a_new_folder_one_is_refused(
    tiny_llama: Path, data_file: Path, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("fork")
    turn, told = context.Barrier(2), context.Queue()
    arguments = (tiny_llama, data_file, tmp_path / "out", turn, told)
    both = [context.Process(target=begin, args=arguments) for _ in range(2)]
    for process in both:
        process.start()
    answers = [told.get(timeout=60) for _ in both]
    for process in both:
        process.join()
    assert answers.count("begun") == 1
    other = next(answer for answer in answers if answer != "begun")
    assert "another run has begun here" in other or "is in use by a run" in other


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_made_is_refused(tiny_llama: Path, data_file: Path, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(UserError, match="nothing can be written into"):
        Trainer(config(tiny_llama, data_file, tmp_path / "closed" / "out")).train()


def test_a_file_in_the_place_of_the_output_folder_is_refused(
    tiny_llama: Path, data_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(UserError, match=r"output_dir .*: .*file is a file"):
            Trainer(config(tiny_llama, data_file, out)).train()


def test_texts_of_plugins_reach_the_monitors(
    tiny_llama: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Teller:
        @hookimpl
        def collie_step_end(self, run: Run, step: int) -> None:
            if step == 2:
                run.text("sample", "what the model wrote")

    cfg = config(tiny_llama, data_file, tmp_path / "out", monitors=["console"], train={"max_steps": 2})
    Trainer(cfg, callbacks=[Teller()]).train()
    assert "step 2  sample:\nwhat the model wrote" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"trainable": ["nothing.*"]}},
        {"optimizer": {"name": "lomo", "lr": 0.1, "param_groups": []}, "train": {"frozen": ["*"]}},
        {"model": {"path": "misshaped"}},
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_the_data_are_read(
    tiny_llama: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    class Unread(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            raise AssertionError("a record was read")

    if "model" in changes:
        from safetensors.torch import load_file, save_file

        folder = Path(shutil.copytree(tiny_llama, tmp_path / "misshaped"))
        tensors = load_file(folder / "model.safetensors")
        save_file({**tensors, "lm_head.weight": torch.zeros(3, 3)}, folder / "model.safetensors")
        changes = {"model": {"path": str(folder)}}
    cfg = config(tiny_llama, tmp_path / "none.jsonl", tmp_path / "out", **changes)
    with pytest.raises(UserError):
        Trainer(cfg, train_dataset=Unread([{"text": "a"}])).train()


def test_what_each_stretch_of_a_pipeline_recomputes_is_its_own(tiny_llama: Path, tmp_path: Path) -> None:
    from collie_core.layouts.recompute import runner_for

    class Block(torch.nn.Linear):
        calls = 0

        def forward(self, h: torch.Tensor, context: Any = None) -> torch.Tensor:
            Block.calls += 1
            return super().forward(h).tanh()

    run = Run(config(tiny_llama, tmp_path / "none.jsonl", tmp_path / "out"), tmp_path, torch.device("cpu"))
    run.resolved["activation_checkpointing"] = {"0": 2, "2": 1}
    calls = []
    for begin in (0, 2, 4):  # the last one was not measured, and the CPU recomputes nothing by itself
        Block.calls = 0
        run_blocks = runner_for([Block(3, 3), Block(3, 3)], run, begin=begin, total=6)
        run_blocks(torch.ones(1, 3, requires_grad=True), None).sum().backward()  # type: ignore[arg-type]
        calls.append(Block.calls)
    assert calls == [4, 3, 2]


def test_a_run_that_compiles_nothing_imports_no_compiler(
    tiny_llama: Path, data_file: Path, tmp_path: Path
) -> None:
    changes = {"optimizer": {"name": "lomo", "lr": 0.01}, "train": {"max_steps": 1, "compile": False}}
    run = config(tiny_llama, data_file, tmp_path / "out", **changes)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run.to_mapping()))
    code = (
        "import sys; from collie_core.cli.main import main; assert main(['train', sys.argv[1]]) == 0; "
        "heavy = {'torch._dynamo', 'torch.distributed.fsdp', 'torch.distributed.tensor'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run.yaml")]
    environ = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
