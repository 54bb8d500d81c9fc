"""The commands on a trained run: eval, generate, export, config, doctor; evaluation and life-cycle events."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
import yaml
from training_helpers import all_lines, config, largest_difference, weights

from collie_core import AutoModelForCausalLM, AutoTokenizer, CollieConfig, Trainer
from collie_core.cli.main import main
from collie_core.plugin import Run, hookimpl


@pytest.fixture(scope="module")
def trained(
    tiny_llama: Path, records: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with `run.yaml`, the data and the finished run `out`."""
    folder = tmp_path_factory.mktemp("trained")
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    cfg = config(
        tiny_llama,
        data,
        folder / "out",
        optimizer={"name": "adalomo", "lr": 0.02},
        data={"eval": str(data)},
        train={"epochs": 2},
        checkpoint={"every_steps": 10},
    )
    (folder / "run.yaml").write_text(yaml.safe_dump(cfg.to_mapping()))
    Trainer(cfg).train()
    return folder


def out_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    status = main(list(arguments))
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured.out


def reference_perplexity(model_path: Path, records: list[dict[str, str]]) -> float:
    """transformers, one record at a time, summed over target tokens."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = LlamaForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    total, count = 0.0, 0
    for record in records:
        encoded = tokenizer(record["input"] + record["output"], return_offsets_mapping=True)
        ids = [*encoded["input_ids"], tokenizer.eos_token_id][:64]
        trained = [end > len(record["input"]) for _, end in encoded["offset_mapping"]] + [True]
        labels = torch.tensor([token if flag else -100 for token, flag in zip(ids, trained, strict=False)])
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum"))
        count += int((labels[1:] != -100).sum())
    return math.exp(total / count)


def test_perplexity_is_token_weighted_whatever_the_batch(
    trained: Path, records: list[dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    expected = reference_perplexity(trained / "out" / "model", records)
    for rows in (1, 3, 16):
        text = out_of(
            capsys,
            "eval",
            str(trained / "run.yaml"),
            f"evaluate.micro_batch_size={rows}",
            "--model",
            str(trained / "out"),
            "--json",
        )
        assert json.loads(text)["perplexity/perplexity"] == pytest.approx(expected, rel=1e-5)
    last = [line for line in all_lines(trained / "out") if "perplexity/perplexity" in line][-1]
    assert last["perplexity/perplexity"] == pytest.approx(expected, rel=1e-5)


def test_a_run_a_checkpoint_and_the_export_are_the_same_model(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = sorted((trained / "out" / "checkpoints").glob("step_*"))[-1]
    figures = [
        out_of(capsys, "eval", str(trained / "run.yaml"), "--model", str(model))
        for model in (trained / "out", newest, trained / "out" / "model")
    ]
    assert figures[0] == figures[1] == figures[2]
    assert figures[0].startswith("perplexity/perplexity ")


def test_generate_prints_the_answer_alone(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "Question 1: "
    text = out_of(
        capsys,
        "generate",
        str(trained / "out"),
        "--prompt",
        prompt,
        "--max-new-tokens",
        "12",
        "--dtype",
        "float32",
    )
    tokenizer = AutoTokenizer.from_pretrained(trained / "out")
    model = AutoModelForCausalLM.from_pretrained(trained / "out")
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    new = model.generate(ids, max_new_tokens=12)[0, ids.shape[1] :]
    assert text == tokenizer.decode(new, skip_special_tokens=True) + "\n"
    drawn = [
        out_of(
            capsys,
            "generate",
            str(trained / "out"),
            "--prompt",
            prompt,
            "--temperature",
            "2",
            "--seed",
            seed,
            "--json",
        )
        for seed in ("1", "1", "2")
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert json.loads(drawn[0])["prompt"] == prompt


def test_export_from_a_checkpoint_equals_the_final_export(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = sorted((trained / "out" / "checkpoints").glob("step_*"))[-1]
    for name, source in (("a", newest), ("b", trained / "out"), ("c", trained / "out" / "model")):
        out = tmp_path / name / "model"
        assert out_of(capsys, "export", str(source), str(out)) == f"{out}\n"
        assert largest_difference(weights(tmp_path / name), weights(trained / "out")) == 0.0
        assert AutoTokenizer.from_pretrained(out)("a b")["input_ids"]
    assert main(["export", str(newest), str(tmp_path / "a" / "model")]) == 2
    assert "not empty" in capsys.readouterr().err
    assert main(["export", str(newest), str(tmp_path / "d"), "--as", "glm"]) == 2
    assert not (tmp_path / "d").exists()


def test_transformers_reads_the_export_with_equal_logits(trained: Path) -> None:
    from transformers import AutoModelForCausalLM as Stock
    from transformers import AutoTokenizer as StockTokenizer

    folder = trained / "out" / "model"
    ids = StockTokenizer.from_pretrained(folder)("Numbers such as 1, 2", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        stock = Stock.from_pretrained(folder, dtype=torch.float32)(ids).logits
        ours = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-5)


def test_the_output_folder_holds_what_is_documented(trained: Path) -> None:
    out = trained / "out"
    assert (
        CollieConfig.from_yaml(out / "config.yaml").to_mapping()
        == CollieConfig.from_yaml(trained / "run.yaml").to_mapping()
    )
    run = json.loads((out / "run.json").read_text())
    used = {(plugin["kind"], plugin["name"], plugin["distribution"]) for plugin in run["plugins"]}
    assert used == {
        ("layout", "native", "collie-core"),
        ("optimizer", "adalomo", "collie-lomo"),
        ("model", "llama", "collie-llama"),
    }
    assert all(Path(plugin["file"]).is_file() and plugin["version"] for plugin in run["plugins"])
    assert run["resolved"]["activation_checkpointing"] == "none" and run["resolved"]["compile"] is False
    assert set(run["resolved"]["ops"]) == {"attention", "packed_attention", "cross_entropy"}
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step_000010", "step_000020"]


def test_config_commands(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(trained / "run.yaml")
    shown = yaml.safe_load(out_of(capsys, "config", "show", path, "train.epochs=7"))
    assert shown["train"]["epochs"] == 7 and shown["optimizer"]["name"] == "adalomo"
    assert "layout native" in json.loads(out_of(capsys, "config", "check", path, "--json"))["plugins"]
    assert main(["config", "check", path, "optimizer.clip_mode=sometimes"]) == 2
    assert "override 'optimizer.clip_mode=sometimes'" in capsys.readouterr().err
    assert main(["config", "check", path, "layout.sequence_parallel=true"]) == 2
    assert "layout.sequence_parallel" in capsys.readouterr().err


def test_the_schema_holds_the_options_of_plugins(capsys: pytest.CaptureFixture[str]) -> None:
    schema = json.loads(out_of(capsys, "config", "schema"))
    sections = {
        choice["properties"]["name"]["const"]: choice["properties"]
        for choice in schema["properties"]["optimizer"]["anyOf"]
        if "properties" in choice
    }
    assert {"lomo", "adalomo", "adamw", "sgd"} <= set(sections)
    assert "clip_mode" in sections["lomo"] and "betas" in sections["adamw"] and "momentum" in sections["sgd"]
    assert "lr" in sections["lomo"]


def test_doctor_finds_no_problem_here(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(out_of(capsys, "doctor", "--json"))
    assert found["problems"] == [] and found["versions"]["torch"] == torch.__version__


def test_unknown_commands_and_options_end_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian", "x.yaml"]) == 2
    assert "did you mean 'train'" in capsys.readouterr().err
    assert main([]) == 2
    assert main(["--help"]) == 0


class Recorder:
    """Writes down every event."""

    def __init__(self) -> None:
        self.events: list[str] = []

    @hookimpl
    def collie_model_loaded(self, model: torch.nn.Module) -> None:
        self.events.append("model_loaded")

    @hookimpl
    def collie_run_start(self) -> None:
        self.events.append("run_start")

    @hookimpl
    def collie_epoch_start(self, epoch: int) -> None:
        self.events.append(f"epoch_start {epoch}")

    @hookimpl
    def collie_step_start(self, step: int) -> None:
        self.events.append(f"step_start {step}")

    @hookimpl
    def collie_backward_end(self, step: int) -> None:
        self.events.append(f"backward_end {step}")

    @hookimpl
    def collie_step_end(self, run: Run, step: int) -> None:
        self.events.append(f"step_end {step}")
        if step == 3:
            run.stop("enough")

    @hookimpl
    def collie_epoch_end(self, epoch: int) -> None:
        self.events.append(f"epoch_end {epoch}")

    @hookimpl
    def collie_evaluate_start(self) -> None:
        self.events.append("evaluate_start")

    @hookimpl
    def collie_evaluate_end(self, metrics: dict[str, float]) -> None:
        self.events.append("evaluate_end")

    @hookimpl
    def collie_checkpoint_saving(self, step: int) -> None:
        self.events.append(f"checkpoint_saving {step}")

    @hookimpl
    def collie_checkpoint_saved(self, step: int, path: Path) -> None:
        assert (path / "manifest.json").is_file()
        self.events.append(f"checkpoint_saved {step}")

    @hookimpl
    def collie_exported(self, path: Path) -> None:
        assert (path / "model.safetensors").is_file()
        self.events.append("exported")

    @hookimpl
    def collie_run_error(self, error: BaseException) -> None:
        self.events.append(f"run_error {type(error).__name__}")

    @hookimpl
    def collie_run_end(self) -> None:
        self.events.append("run_end")


def test_events_come_in_order_and_may_stop_the_run(tiny_llama: Path, data_file: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    cfg = config(
        tiny_llama,
        data_file,
        tmp_path / "out",
        train={"micro_batch_size": 20, "epochs": 9},
        data={"eval": str(data_file)},
    )
    result = Trainer(cfg, callbacks=[recorder]).train()
    assert result.stopped_by == "enough" and result.step == 3 and result.model is not None
    assert recorder.events == [
        "model_loaded",
        "run_start",
        "epoch_start 0",
        *("step_start 1", "backward_end 1", "step_end 1"),
        *("step_start 2", "backward_end 2", "step_end 2"),
        "epoch_end 0",
        "epoch_start 1",
        *("step_start 3", "backward_end 3", "step_end 3"),
        *("checkpoint_saving 3", "checkpoint_saved 3"),
        *("evaluate_start", "evaluate_end"),
        "exported",
        "run_end",
    ]


def test_an_error_is_told_and_monitors_are_closed(tiny_llama: Path, data_file: Path, tmp_path: Path) -> None:
    recorder = Recorder()

    def broken(logits: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("in the user's loss")

    with pytest.raises(ZeroDivisionError):
        Trainer(config(tiny_llama, data_file, tmp_path / "out"), callbacks=[recorder], loss_fn=broken).train()
    assert recorder.events[-2:] == ["run_error ZeroDivisionError", "run_end"]


def test_a_failing_callback_is_dropped_and_the_run_goes_on(
    tiny_llama: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Failing:
        @hookimpl
        def collie_step_end(self, step: int) -> None:
            raise RuntimeError("boom")

    result = Trainer(config(tiny_llama, data_file, tmp_path / "out"), callbacks=[Failing()]).train()
    assert result.step == 10
    assert capsys.readouterr().err.count("boom") == 1


@pytest.mark.parametrize("kind", [RuntimeError, SystemExit])
def test_a_failing_monitor_is_dropped_and_the_run_goes_on(
    tiny_llama: Path,
    data_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: type[BaseException],
) -> None:
    class Failing:
        def log(self, step: int, metrics: object) -> None:
            raise kind("boom")

        def close(self, error: BaseException | None) -> None:
            raise kind("closed")

    class Replacing:
        @hookimpl(wrapper=True)
        def collie_monitor(self) -> Generator[None, object, object]:
            yield
            return Failing()

    cfg = config(tiny_llama, data_file, tmp_path / "out", monitors=["console"])
    result = Trainer(cfg, callbacks=[Replacing()]).train()
    err = capsys.readouterr().err
    assert result.step == 10
    assert err.count("boom") == 1 and "closed" not in err


def test_objects_instead_of_paths(tiny_llama: Path, records: list[dict[str, str]], tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    Trainer(config(tiny_llama, data, tmp_path / "paths", data={"eval": str(data)})).train()
    cfg = config(tiny_llama, data, tmp_path / "objects")
    cfg.data.train = None
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    Trainer(cfg, model=model, tokenizer=tokenizer, train_dataset=records, eval_dataset=records[:5]).train()
    assert largest_difference(weights(tmp_path / "paths"), weights(tmp_path / "objects")) == 0.0


def test_tied_embeddings_stay_tied(tiny_llama: Path, data_file: Path, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    folder = Path(shutil.copytree(tiny_llama, tmp_path / "tied"))
    content = {**json.loads((folder / "config.json").read_text()), "tie_word_embeddings": True}
    model = AutoModelForCausalLM.from_config(content, seed=1)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)
    for optimizer in ("lomo", "sgd"):
        Trainer(
            config(folder, data_file, tmp_path / optimizer, optimizer={"name": optimizer, "lr": 0.1})
        ).train()
    assert "lm_head.weight" not in weights(tmp_path / "lomo")
    assert largest_difference(weights(tmp_path / "lomo"), weights(tmp_path / "sgd")) < 1e-6
    stock = LlamaForCausalLM.from_pretrained(tmp_path / "lomo" / "model", dtype=torch.float32)
    assert stock.lm_head.weight is stock.model.embed_tokens.weight


def test_profile_writes_a_trace(
    tiny_llama: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config(tiny_llama, data_file, tmp_path / "out").to_mapping()))
    summary = json.loads(out_of(capsys, "train", str(path), "--profile", "2", "--json"))
    assert summary["step"] == 10 and Path(summary["model"]).is_dir()
    events = json.loads((tmp_path / "out" / "profile" / "trace.json").read_text())["traceEvents"]
    assert any("scaled_dot_product" in event.get("name", "") for event in events)
    assert main(["train", str(path), "--profile", "0"]) == 2
