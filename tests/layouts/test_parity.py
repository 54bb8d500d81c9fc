"""Every layout gives the losses, norms and weights of one process, with every method and every family."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from layout_jobs import LAYOUTS, Training, base_config, copies, run_job, unequal_replicas
from safetensors.torch import load_file
from training_helpers import all_lines, largest_difference, losses, metrics, weights

from collie_core.registry import Registry

CASES = Path(__file__).parent.parent / "golden" / "cases"

#: method -> (sections of the config, largest difference of a weight after five steps)
METHODS: dict[str, tuple[dict[str, Any], float]] = {
    "sgd": ({"optimizer": {"name": "sgd", "lr": 0.1}}, 1e-6),
    "adamw": ({"optimizer": {"name": "adamw", "lr": 1e-4}}, 1e-2 * 1e-4 * 5),
    "lomo": ({"optimizer": {"name": "lomo", "lr": 0.1, "clip_grad_norm": 0.5}}, 1e-6),
    "adalomo": ({"optimizer": {"name": "adalomo", "lr": 1e-4}}, 1e-2 * 1e-4 * 5),
    "lora": (
        {"adapters": [{"name": "lora", "r": 4}], "optimizer": {"name": "adamw", "lr": 1e-4}},
        1e-2 * 1e-4 * 5,
    ),
}
#: one micro-batch a step and no norm: the update inside the backward pass
IN_HOOKS = {"optimizer": {"name": "lomo", "lr": 0.1}, "train": {"gradient_accumulation_steps": 1}}
OFFERED = {(info.kind, info.name) for info in Registry().plugins()}
INSTALLED = {name: m for name, m in METHODS.items() if ("optimizer", m[0]["optimizer"]["name"]) in OFFERED}
MANY = [name for name in LAYOUTS if name != "single"]
BFLOAT16 = ("dp2_zero0", "dp2_zero3", "tp2_sp", "pp2")


def families() -> dict[str, Path]:
    """A small checkpoint of each installed family that has one and can be cut in two."""
    found = {}
    for config in sorted(CASES.glob("*/config.json")):
        content = json.loads(config.read_text())
        if ("model", content["model_type"]) in OFFERED:
            found[config.parent.name] = config.parent
    return found


def trainings(folder: Path, layout: str, llama: Path, tied: Path, data: Path) -> dict[str, Training]:
    """Everything that a layout is tested with on LLaMA, by name."""
    found = {}
    for name, (sections, _) in INSTALLED.items():
        evaluated = {"eval": str(data)} if name == "sgd" else {}
        config = base_config(llama, data, folder / name, layout, **sections, data=evaluated)
        found[name] = Training(config, ["generate", "export"] if name == "sgd" else [])
    config = base_config(llama, data, folder / "in_hooks", layout, **IN_HOOKS)
    found["in_hooks"] = Training(config)
    config = base_config(tied, data, folder / "tied", layout, **INSTALLED["lomo"][0], data={"packing": True})
    found["tied"] = Training(config, ["export"])
    if layout in BFLOAT16:
        low = {"model": {"dtype": "bfloat16"}, "optimizer": {"name": "adalomo", "lr": 0.01}}
        found["bfloat16"] = Training(base_config(tied, data, folder / "bfloat16", layout, **low))
    return found


@pytest.fixture(scope="module")
def alone(
    tmp_path_factory: pytest.TempPathFactory, make_llama: Callable[..., Path], data: Path
) -> dict[str, Training]:
    """The trainings on one process."""
    folder = tmp_path_factory.mktemp("single")
    found = trainings(folder, "single", make_llama(), make_llama(tie_word_embeddings=True), data)
    run_job(folder, "single", list(found.values()))
    return found


def same(one: Path, other: Path, bound: float) -> Iterator[str]:
    """What differs between two runs by more than it may."""
    expected, found = losses(one), losses(other)
    if len(found) != len(expected) or found != pytest.approx(expected, rel=2e-6):
        yield f"losses {found} are not {expected}"
    norms = [[line["grad_norm"] for line in metrics(run)] for run in (one, other)]
    if norms[1] != pytest.approx(norms[0], rel=5e-6):
        yield f"norms {norms[1]} are not {norms[0]}"
    counts = [[(line["tokens"], line["epoch"]) for line in metrics(run)] for run in (one, other)]
    if counts[0] != counts[1]:
        yield f"tokens {counts[1]} are not {counts[0]}"
    difference = largest_difference(weights(one), weights(other))
    if difference > bound:
        yield f"weights differ by {difference} > {bound}"


def has_copies(layout: str, tied: bool) -> bool:
    """Whether two ranks hold the same part of some parameter."""
    sizes = LAYOUTS[layout][1]
    sharded = sizes.get("layout", {}).get("zero_stage", 0) > 0
    return (
        sizes.get("tp_size", 1) > 1
        or (sizes.get("dp_size", 1) > 1 and not sharded)
        or (sizes.get("pp_size", 1) > 1 and tied)
    )


@pytest.mark.parametrize("layout", MANY)
def test_a_layout_gives_what_one_process_gives(
    layout: str,
    alone: dict[str, Training],
    tmp_path: Path,
    make_llama: Callable[..., Path],
    data: Path,
) -> None:
    llama, tied = make_llama(), make_llama(tie_word_embeddings=True)
    found = trainings(tmp_path, layout, llama, tied, data)
    run_job(tmp_path, layout, list(found.values()))
    problems = []
    for name, training in found.items():
        bound = METHODS[name][1] if name in METHODS else 1e-6
        if name != "bfloat16":
            problems += [f"{name}: {text}" for text in same(alone[name].out, training.out, bound)]
        replicas = training.out.with_suffix(".replicas.json")
        problems += [f"{name}: replicas of {box} differ" for box in unequal_replicas(replicas)]
        assert bool(copies(replicas)) == has_copies(layout, name in ("tied", "bfloat16"))
    assert not problems, "\n".join(problems)
    for name in ("sgd", "tied"):
        loaded = [load_file(t[name].out.with_suffix(".loaded.safetensors")) for t in (alone, found)]
        assert list(loaded[0]) == list(loaded[1])
        assert largest_difference(*loaded) == 0.0
    tokens = [json.loads(t["sgd"].out.with_suffix(".tokens.json").read_text()) for t in (alone, found)]
    assert tokens[0] == tokens[1]
    evaluations = [[x for x in all_lines(t["sgd"].out) if "loss" not in x] for t in (alone, found)]
    assert len(evaluations[0]) == len(evaluations[1]) == 1
    assert evaluations[1][0] == pytest.approx(evaluations[0][0], rel=2e-6)


@pytest.fixture(scope="module")
def families_alone(tmp_path_factory: pytest.TempPathFactory, token_data: Path) -> dict[str, Training]:
    folder = tmp_path_factory.mktemp("families")
    found = family_trainings(folder, "single", token_data)
    run_job(folder, "single", list(found.values()))
    return found


def family_trainings(folder: Path, layout: str, token_data: Path) -> dict[str, Training]:
    lomo = INSTALLED["lomo"][0]
    return {
        name: Training(
            base_config(
                path, token_data, folder / name, layout, **lomo, data={"packing": number % 2 == 0}
            ),
            ["tokenizer", "export"],
        )
        for number, (name, path) in enumerate(families().items())
    }


@pytest.mark.parametrize("layout", ["tp2_sp", "pp2", "dp2_zero3", "dp2_tp2_pp2"])
def test_a_layout_serves_every_family(
    layout: str, families_alone: dict[str, Training], tmp_path: Path, token_data: Path
) -> None:
    found = family_trainings(tmp_path, layout, token_data)
    assert len(found) >= 8
    run_job(tmp_path, layout, list(found.values()))
    problems = [
        f"{name}: {text}"
        for name, training in found.items()
        for text in same(families_alone[name].out, training.out, 1e-6)
    ]
    for name, training in found.items():
        replicas = training.out.with_suffix(".replicas.json")
        problems += [f"{name}: replicas of {box} differ" for box in unequal_replicas(replicas)]
        loaded = [t.out.with_suffix(".loaded.safetensors") for t in (families_alone[name], training)]
        if largest_difference(load_file(loaded[0]), load_file(loaded[1])):
            problems.append(f"{name}: is loaded otherwise")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("vocabulary", [251, 32003])
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_vocabulary_that_does_not_divide(
    ranks: int, vocabulary: int, tmp_path: Path, make_llama: Callable[..., Path], token_data: Path
) -> None:
    tied = ranks == 3
    sizes = {"num_attention_heads": 6, "num_key_value_heads": 6, "hidden_size": 24, "head_dim": 4}
    model = make_llama(vocab_size=vocabulary, tie_word_embeddings=tied, **sizes)
    name = f"tp{ranks}"
    method = {"optimizer": {"name": "adalomo", "lr": 1e-4, "clip_grad_norm": 0.5}}
    runs = {
        layout: Training(
            base_config(model, token_data, tmp_path / layout, layout, **method), ["tokenizer", "export"]
        )
        for layout in ("single", name)
    }
    for layout, training in runs.items():
        run_job(tmp_path / f"job_{layout}", layout, [training])
    assert not list(same(runs["single"].out, runs[name].out, 1e-2 * 1e-4 * 5))
    loaded = [load_file(t.out.with_suffix(".loaded.safetensors")) for t in runs.values()]
    assert largest_difference(*loaded) == 0.0
    assert loaded[0]["embed.tokens.weight"].shape[0] == vocabulary


def test_fewer_key_value_heads_than_ranks(
    tmp_path: Path, make_llama: Callable[..., Path], token_data: Path
) -> None:
    model = make_llama(num_attention_heads=4, num_key_value_heads=2)
    runs = {
        layout: [
            Training(
                base_config(model, token_data, tmp_path / layout / name, layout, **INSTALLED[name][0]),
                ["tokenizer", "export"],
            )
            for name in ("lomo", "adalomo")
        ]
        for layout in ("single", "tp4")
    }
    for layout, jobs in runs.items():
        run_job(tmp_path / f"job_{layout}", layout, jobs)
    for one, other in zip(*runs.values(), strict=True):
        assert not list(same(one.out, other.out, 1e-2 * 1e-4 * 5))
        assert not unequal_replicas(other.out.with_suffix(".replicas.json"))
