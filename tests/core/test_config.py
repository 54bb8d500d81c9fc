"""Config: YAML with lines and nearest names, overrides, assignment, checks across keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from collie_core import CollieConfig
from collie_core.config.checks import accumulation_steps, check_config, resume_differences
from collie_core.config.load import load_config
from collie_core.errors import ConfigError

MINIMAL = "model: {path: some/folder}\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "train.yaml"
    path.write_text(text)
    return path


def failure(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text), overrides)
    return str(caught.value)


def test_minimal_file_has_every_default(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL))
    assert config.dp_size == config.tp_size == config.pp_size == 1
    assert config.output_dir == "runs/train"
    assert [monitor.name for monitor in config.monitors] == ["console"]
    assert config.layout.name == "native"


def test_yaml_numbers_and_words_follow_yaml_1_2(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL + "optimizer: {name: sgd, lr: 3e-4}\nseed: 010\n"))
    assert config.optimizer.lr == 3e-4
    assert config.seed == 10
    assert "got 'yes'" in failure(tmp_path, MINIMAL + "data: {packing: yes}\n")


def test_unknown_key_names_file_line_and_nearest(tmp_path: Path) -> None:
    message = failure(tmp_path, MINIMAL + "train:\n  epochs: 1\n  micro_batch: 2\n")
    assert (
        f"{tmp_path}/train.yaml:4: train.micro_batch: unknown key, did you mean 'micro_batch_size'?"
        in message
    )


def test_an_override_is_named_for_what_it_replaced(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "data:\n  train: [{path: a, weight: 1}]\n")
    with pytest.raises(ConfigError, match=r"^override 'data.train=.*': data.train.0.weight: expected"):
        load_config(path, ["data.train.0.weight=1", "data.train=[{path: a, weight: 0}]"])


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    message = failure(tmp_path, MINIMAL + "optimzer: lomo\ntrain: {epochs: many}\nuse_flash: maybe\n")
    assert "did you mean 'optimizer'" in message
    assert "train.epochs: expected a whole number >= 1, got 'many'" in message
    assert "use_flash: expected auto or true or false, got 'maybe'" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: {epochs: 1.5}\n", "expected a whole number"),
        ("train: {epochs: true}\n", "expected a whole number"),
        ("optimizer: {name: sgd, lr: '1'}\n", "optimizer.lr: expected a number > 0"),
        ("dp_size: 0\n", "dp_size: expected a whole number >= 1, got 0"),
        ("model: {path: x, dtype: bf16}\n", "given twice, first on line 1"),
        ("schedule: cosin\n", "did you mean 'cosine'"),
        ("train: {activation_checkpointing: ful}\n", "did you mean 'full'"),
        ("monitors: [console, {project: x}]\n", "monitors.1.name: is required"),
        ("data: {train: [{path: a, wieght: 2}]}\n", "did you mean 'weight'"),
        ("data: [\n", "not valid YAML"),
        ("- a\n- b\n", "not valid YAML"),
        ("optimizer: {name: sgd, lr: .inf}\n", "optimizer.lr: expected a number > 0"),
        ("optimizer: {name: sgd, weight_decay: .nan}\n", "optimizer.weight_decay: expected a number >= 0"),
        ("seed: 9223372036854775808\n", "seed: expected a whole number >= 0"),
        ("plugins: &all\n  - *all\n", "train.yaml:2: plugins.0: an alias of what it stands in"),
    ],
)
def test_wrong_values_are_told(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in failure(tmp_path, MINIMAL + text)


def test_bad_syntax_in_an_override_names_it(tmp_path: Path) -> None:
    message = failure(tmp_path, MINIMAL, "data.train=[a, b")
    assert message.startswith("override 'data.train=[a, b'") and "not valid YAML" in message


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL)
    with pytest.raises(ConfigError, match="did you mean 'train.yaml'"):
        load_config(tmp_path / "trian.yaml")


def test_overrides_are_typed_by_the_same_models(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "optimizer: lomo\nmonitors: [console]\n")
    config = load_config(
        path,
        [
            "optimizer.lr=3e-4",
            "optimizer.clip_mode=keep",
            "train.epochs=2",
            "data.train=[a.jsonl, b.jsonl]",
            "monitors.0.every_steps=5",
        ],
    )
    assert config.optimizer.name == "lomo" and config.optimizer.lr == 3e-4
    assert config.optimizer.options == {"clip_mode": "keep"}
    assert config.train.epochs == 2
    assert config.data.train is not None and [source.path for source in config.data.train] == [
        "a.jsonl",
        "b.jsonl",
    ]
    assert config.monitors[0].options == {"every_steps": 5}
    assert "override 'train.epochs=x': train.epochs: expected a whole number" in failure(
        tmp_path, MINIMAL, "train.epochs=x"
    )
    assert "expected key.path=value" in failure(tmp_path, MINIMAL, "train.epochs")
    assert "expected an index" in failure(tmp_path, MINIMAL + "monitors: [console]\n", "monitors.3=csv")


def test_python_construction_and_assignment_are_validated() -> None:
    config = CollieConfig.from_pretrained("some/folder", dp_size=2, optimizer={"name": "lomo", "lr": 1})
    config.tp_size, config.use_flash = 2, True
    assert (config.dp_size, config.tp_size, config.use_flash, config.optimizer.lr) == (2, 2, True, 1.0)
    with pytest.raises(ConfigError, match="did you mean 'tp_size'"):
        config.tp_sise = 2
    with pytest.raises(ConfigError, match="expected auto or true or false"):
        config.use_flash = "sometimes"  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="did you mean 'dp_size'"):
        CollieConfig(model={"path": "x"}, dp_sise=2)
    with pytest.raises(ConfigError, match="did you mean 'epochs'"):
        config.train.epoch = 3


def test_a_config_survives_its_own_yaml(tmp_path: Path) -> None:
    import yaml

    config = load_config(
        write(tmp_path, MINIMAL + "optimizer: {name: lomo, clip_mode: keep}\ndata: {train: a.jsonl}\n")
    )
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(config.to_mapping()))
    assert load_config(again).to_mapping() == config.to_mapping()


def test_sizes_must_multiply_to_the_processes() -> None:
    config = CollieConfig(model={"path": "x"}, dp_size=2, tp_size=3)
    with pytest.raises(
        ConfigError, match=r"dp_size 2 x tp_size 3 x pp_size 1 = 6, but the job has 1 process"
    ):
        check_config(config, world_size=1)


@pytest.mark.parametrize(
    ("train", "accumulation"),
    [
        ({"micro_batch_size": 4}, 1),
        ({"micro_batch_size": 4, "gradient_accumulation_steps": 3}, 3),
        ({"micro_batch_size": 4, "global_batch_size": 32}, 8),
        ({"micro_batch_size": 4, "global_batch_size": 32, "gradient_accumulation_steps": 8}, 8),
    ],
)
def test_accumulation_follows_from_the_sizes(train: dict[str, int], accumulation: int) -> None:
    assert accumulation_steps(CollieConfig(model={"path": "x"}, train=train)) == accumulation


def test_sizes_that_do_not_divide_are_refused_with_the_arithmetic() -> None:
    config = CollieConfig(model={"path": "x"}, train={"micro_batch_size": 3, "global_batch_size": 32})
    with pytest.raises(ConfigError, match="32 is no multiple of micro_batch_size 3 x dp_size 1 = 3"):
        accumulation_steps(config)
    config.train.micro_batch_size, config.train.gradient_accumulation_steps = 4, 2
    with pytest.raises(ConfigError, match="so it must be 8"):
        accumulation_steps(config)


@pytest.mark.parametrize(
    ("key", "data"),
    [
        ("schedule", {"schedule": {"name": "cosine", "warmup_steps": 3, "warmup_ratio": 0.1}}),
        ("schedule.min_ratio", {"schedule": {"name": "constant", "min_ratio": 0.5}}),
        ("schedule.decay_ratio", {"schedule": {"name": "cosine", "decay_ratio": 0.3}}),
        ("data.train", {"data": {"train": [{"path": "a", "weight": 1.0}, {"path": "b"}]}}),
        ("train.frozen", {"train": {"trainable": ["*"], "frozen": ["*"]}}),
    ],
)
def test_contradictions_are_refused(key: str, data: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        check_config(CollieConfig(model={"path": "x"}, **data), world_size=1)


def test_a_resume_may_change_some_keys_and_no_others() -> None:
    saved = CollieConfig(model={"path": "x"}, train={"micro_batch_size": 4, "epochs": 1}).to_mapping()
    free = CollieConfig(
        model={"path": "x"},
        data={"eval": "other.jsonl"},
        train={"micro_batch_size": 2, "gradient_accumulation_steps": 2, "epochs": 3},
        monitors=["csv"],
        checkpoint={"keep": 5},
        output_dir="elsewhere",
    )
    assert resume_differences(saved, free) == []
    other = CollieConfig(
        model={"path": "x"}, train={"micro_batch_size": 8}, seed=1, optimizer={"name": "sgd", "lr": 1.0}
    )
    changed = {path for path, _ in resume_differences(saved, other)}
    assert changed == {("seed",), ("optimizer", "lr"), ("optimizer", "name"), ("train", "micro_batch_size")}


@pytest.mark.parametrize(
    ("train", "dp_size", "key", "now", "keep"),
    [
        ({"micro_batch_size": 8}, 2, "train.micro_batch_size", (16, 8, 1, 2), (4, 1, 2)),
        (
            {"micro_batch_size": 2, "gradient_accumulation_steps": 3},
            2,
            "train.micro_batch_size",
            (12, 2, 3, 2),
            (2, 2, 2),
        ),
        (
            {"micro_batch_size": 4, "gradient_accumulation_steps": 2},
            2,
            "train.gradient_accumulation_steps",
            (16, 4, 2, 2),
            (4, 1, 2),
        ),
        ({"micro_batch_size": 4}, 4, "dp_size", (16, 4, 1, 4), (2, 1, 4)),
        ({"micro_batch_size": 4}, 3, "dp_size", (12, 4, 1, 3), (4, 1, 2)),
    ],
)
def test_another_global_batch_is_told_by_the_key_that_changed_with_all_factors(
    train: dict[str, int],
    dp_size: int,
    key: str,
    now: tuple[int, int, int, int],
    keep: tuple[int, int, int],
) -> None:
    text = "micro_batch_size {} x gradient_accumulation_steps {} x dp_size {}".format
    model = {"path": "x"}
    saved = CollieConfig(model=model, train={"micro_batch_size": 4}, dp_size=2).to_mapping()
    [(path, message)] = resume_differences(saved, CollieConfig(model=model, train=train, dp_size=dp_size))
    assert ".".join(map(str, path)) == key
    assert message == (
        f"the global batch is {now[0]} rows ({text(*now[1:])}), but the run to resume has 8 rows "
        f"({text(4, 1, 2)}); set {text(*keep)}, or use another output_dir"
    )


def test_a_changed_global_batch_size_is_told_by_its_key() -> None:
    train, model = {"micro_batch_size": 2}, {"path": "x"}
    saved = CollieConfig(model=model, train={**train, "global_batch_size": 8}).to_mapping()
    config = CollieConfig(model=model, train={**train, "global_batch_size": 12})
    [(path, message)] = resume_differences(saved, config)
    assert path == ("train", "global_batch_size")
    assert "gradient_accumulation_steps 4 x dp_size 1, global_batch_size 8, or use another" in message
