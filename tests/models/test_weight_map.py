"""The rules between checkpoint tensors and parameters: what each does, and that it inverts exactly."""

from __future__ import annotations

import pytest
import torch

from collie_core.models.weight_map import Ignore, Merge, Rename, Split, Transpose, WeightRule

RULES: list[tuple[WeightRule, dict[str, tuple[int, ...]]]] = [
    (Rename("a", "x"), {"a": (3, 4)}),
    (Transpose("a", "x"), {"a": (3, 4)}),
    (Split("a", ("q", "k", "v"), (4, 2, 2)), {"a": (8, 5)}),
    (Split("a", ("q", "k", "v"), (1, 1, 1), groups=4), {"a": (12, 5)}),
    (Split("a", ("q", "k"), (2, 1), groups=3), {"a": (9,)}),
    (Merge(("a", "b"), "x", (2, 3)), {"a": (2, 4), "b": (3, 4)}),
]


@pytest.mark.parametrize(("rule", "shapes"), RULES)
def test_save_inverts_load(rule: WeightRule, shapes: dict[str, tuple[int, ...]]) -> None:
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    loaded = rule.load(tensors)
    assert tuple(loaded) == rule.targets and tuple(tensors) == rule.sources
    saved = rule.save(loaded)
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[name], tensors[name]) for name in tensors)
    # shapes are found without data
    on_meta = rule.load({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    assert all(on_meta[name].shape == loaded[name].shape for name in loaded)


def test_split_takes_rows_of_every_group() -> None:
    rows = torch.arange(12).unsqueeze(1)
    parts = Split("a", ("q", "k", "v"), (2, 1, 1), groups=3).load({"a": rows})
    assert parts["q"].flatten().tolist() == [0, 1, 4, 5, 8, 9]
    assert parts["k"].flatten().tolist() == [2, 6, 10]
    assert parts["v"].flatten().tolist() == [3, 7, 11]
    whole = Split("a", ("q", "k"), (8, 4)).load({"a": rows})
    assert whole["q"].flatten().tolist() == list(range(8))


def test_merge_puts_one_below_the_other() -> None:
    merged = Merge(("a", "b"), "x", (1, 2)).load({"a": torch.zeros(1, 2), "b": torch.ones(2, 2)})
    assert merged["x"].tolist() == [[0, 0], [1, 1], [1, 1]]


def test_impossible_shapes_are_told() -> None:
    with pytest.raises(ValueError, match="expected 8 rows"):
        Split("a", ("q", "k"), (4, 4)).load({"a": torch.zeros(9, 2)})
    with pytest.raises(ValueError, match="expected"):
        Merge(("a", "b"), "x", (1, 2)).load({"a": torch.zeros(2, 2), "b": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="2 targets"):
        Split("a", ("q", "k"), (4,))


def test_ignore_carries_nothing() -> None:
    rule = Ignore("*.inv_freq")
    assert rule.sources == rule.targets == () and rule.load({}) == rule.save({}) == {}
