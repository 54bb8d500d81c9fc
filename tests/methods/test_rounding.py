"""Stochastic rounding: its noise against an oracle, its mean, its limits, and shards against the whole."""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import pytest
import torch
from torch import Tensor

from collie_core.ops.rounding import Noise, noise, noise_key, round_to, update_elements
from collie_core.optimizers.descent import descend, descend_together

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

MASK = 0xFFFFFFFF


def oracle_noise(seed: int, step: int, name: str, index: int) -> int:
    """The documented function in Python's unbounded integers."""
    digest = hashlib.blake2b(f"{seed}/{step}/{name}".encode(), digest_size=8).digest()
    first, second = struct.unpack("<II", digest)
    x = (index + first) & MASK
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & MASK
    x = ((x ^ (x >> 15) ^ second) * 0xD35A2D97) & MASK
    return (x ^ (x >> 15)) & 0xFFFF


def oracle_round(value: float, noise_value: int) -> int:
    """Bits (16) of the rounded number."""
    [bits] = struct.unpack("<I", struct.pack("<f", value))
    return ((bits + noise_value) & MASK) >> 16


def noise_at(index: Tensor, seed: int, step: int, name: str) -> Tensor:
    origin, key = noise_key(seed, step, name)
    return noise((index + origin).to(torch.int32), torch.tensor(key, dtype=torch.int32))


def rounded(value: Tensor, seed: int = 0, step: int = 1, name: str = "w") -> Tensor:
    target = torch.empty(value.shape, dtype=torch.bfloat16)
    round_to(target, value, seed=seed, step=step, name=name)
    return target


def test_noise_equals_the_oracle_at_every_kind_of_index() -> None:
    indices = [0, 1, 2, 65_535, 2**31 - 1, 2**31, 2**32 - 1, 2**32 + 5]
    for seed, step, name in [(0, 1, "a"), (42, 1000, "model.blocks.3.q.weight"), (7, 2**40, "é")]:
        found = noise_at(torch.tensor(indices), seed, step, name)
        assert found.tolist() == [oracle_noise(seed, step, name, index) for index in indices]


def test_rounding_equals_the_oracle_bit_for_bit() -> None:
    torch.manual_seed(0)
    value = torch.cat([torch.randn(500), torch.randn(500) * 1e-39, torch.randn(500) * 1e38])
    found = rounded(value, 3, 5, "x").view(torch.int16).tolist()
    expected = [oracle_round(v, oracle_noise(3, 5, "x", index)) for index, v in enumerate(value.tolist())]
    assert [bits & 0xFFFF for bits in found] == expected


def test_pieces_do_not_show() -> None:
    value = torch.randn(200_003)  # more than one piece a thread
    found = rounded(value).view(torch.int16)
    for index in (0, 32_767, 32_768, 65_536, 131_072, 200_002):
        expected = oracle_round(float(value[index]), oracle_noise(0, 1, "w", index))
        assert int(found[index]) & 0xFFFF == expected


def test_representable_values_and_specials_stay() -> None:
    held = torch.randn(4096).bfloat16().float()
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), 2.0**-133, -(2.0**-133)])
    value = torch.cat([held, special])
    for step in range(1, 20):
        found = rounded(value, step=step)
        assert torch.equal(found.view(torch.int16), value.bfloat16().view(torch.int16))


def test_every_nan_stays_a_nan() -> None:
    payloads = torch.tensor([0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF], dtype=torch.int32)
    for step in range(1, 50):
        assert rounded(payloads.view(torch.float32), step=step).isnan().all()


def test_the_mean_over_steps_is_the_value() -> None:
    steps = 4000
    torch.manual_seed(1)
    value = torch.cat([torch.randn(40), torch.tensor([1.0 - 2**-20, 2.0 - 2**-12, 3e-39, -3e-39, 1e30])])
    total = torch.zeros_like(value, dtype=torch.float64)
    for step in range(steps):
        total += rounded(value, step=step).double()
    below = (value.view(torch.int32) & -0x10000).view(torch.float32).double()
    above = ((value.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32).double()
    share = (value.double() - below) / (above - below)
    deviation = ((above - below) * (share * (1 - share)).sqrt()).abs() / steps**0.5
    assert ((total / steps - value.double()).abs() <= 5 * deviation + 1e-300).all()


def test_noise_is_uniform_and_unrelated_between_elements_steps_and_names() -> None:
    n = 1 << 16
    index = torch.arange(n)
    streams = {
        key: noise_at(index, *key).double() / 65536 - 0.5
        for key in [(0, 1, "a"), (0, 2, "a"), (0, 1, "b"), (1, 1, "a")]
    }
    first, *others = streams.values()
    bound = 5 * n**-0.5 / 12  # five standard deviations of a covariance of uniform numbers
    for other in [*others, first.roll(1), first.roll(2), first.roll(4096)]:
        assert abs(float((first * other).mean())) < bound
    for stream in streams.values():
        counts = torch.histc(stream, 256, -0.5, 0.5)
        chi_square = float(((counts - n / 256) ** 2 / (n / 256)).sum())
        assert chi_square < 255 + 5 * (2 * 255) ** 0.5


@pytest.mark.parametrize(
    "shape, cuts",
    [
        ((7, 10), [((0, 0), (3, 10)), ((3, 0), (4, 10))]),  # rows, uneven
        ((7, 10), [((0, 0), (7, 4)), ((0, 4), (7, 6))]),  # columns, uneven
        ((7, 10), [((0, 0), (3, 4)), ((0, 4), (3, 6)), ((3, 0), (4, 4)), ((3, 4), (4, 6))]),  # both
        ((3, 4, 5), [((0, 0, 0), (3, 1, 5)), ((0, 1, 0), (3, 3, 5))]),  # the middle of three
        ((11,), [((0,), (1,)), ((1,), (10,))]),
        ((5, 3), [((0, 0), (5, 3)), ((5, 0), (0, 3))]),  # a rank with nothing
    ],
)
def test_shards_round_as_the_whole(
    shape: tuple[int, ...], cuts: list[tuple[tuple[int, ...], tuple[int, ...]]]
) -> None:
    value = torch.randn(shape)
    whole = rounded(value)
    assert not torch.equal(whole, value.bfloat16())  # the noise is at work
    for offset, size in cuts:
        part = tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))
        shard = torch.empty(size, dtype=torch.bfloat16)
        round_to(shard, value[part], seed=0, step=1, name="w", offset=offset, global_shape=shape)
        assert torch.equal(shard, whole[part])


def test_a_part_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="no part of a tensor"):
        target = torch.empty(4, dtype=torch.bfloat16)
        round_to(target, torch.empty(4), seed=0, step=1, name="w", offset=(8,), global_shape=(10,))


def test_strided_targets() -> None:
    value = torch.randn(6, 5)
    target = torch.empty(5, 6, dtype=torch.bfloat16).t()
    round_to(target, value, seed=0, step=1, name="w")
    assert torch.equal(target, rounded(value))


def test_fp32_is_copied_and_fp16_rounded_to_nearest() -> None:
    value = torch.randn(1000)
    for dtype in (torch.float32, torch.float16):
        target = torch.empty(1000, dtype=dtype)
        round_to(target, value, seed=0, step=1, name="w")
        assert torch.equal(target, value.to(dtype))


def minus_scaled(old: Tensor, change: Tensor, factor: float) -> Tensor:
    return old - factor * change


def test_a_rule_sees_the_old_value_in_fp32() -> None:
    start, change = torch.randn(300).bfloat16(), torch.randn(300)
    target = start.clone()
    update_elements(target, minus_scaled, [change], [0.01], Noise(0, 1, "w"))
    assert torch.equal(target, rounded(start.float() - 0.01 * change))


def test_the_shards_of_an_update_are_the_whole_update() -> None:
    start, direction = torch.randn(9, 14).bfloat16(), torch.randn(9, 14).bfloat16()
    finite, rate = torch.tensor(True), torch.tensor(0.01)

    def descended(part: tuple[slice, slice], offset: tuple[int, int]) -> Tensor:
        target = start[part].clone()
        source = Noise(1, 2, "w", offset, (9, 14))
        descend(target, direction[part], source, finite=finite, rate=rate, decay=0.1, clip_value=0.5)
        return target

    whole = descended((slice(None), slice(None)), (0, 0))
    assert torch.equal(descended((slice(2, 5), slice(None)), (2, 0)), whole[2:5])
    assert torch.equal(descended((slice(None), slice(9, 14)), (0, 9)), whole[:, 9:])
    assert torch.equal(descended((slice(4, 9), slice(0, 3)), (4, 0)), whole[4:, :3])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize("count", [1, 3, 40])
def test_descending_together_is_descending_one_by_one(device: str, count: int) -> None:
    """Of any sizes and dtypes, with a rate and a decay for each; what is not finite stays as it was."""
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    sizes = [((7,), (2048,), (3, 2049), (2, 0), (64, 96))[i % 5] for i in range(count)]
    starts = [torch.randn(size, device=device).to(dtypes[i % 3]) for i, size in enumerate(sizes)]
    directions = [torch.randn_like(start, dtype=dtypes[(i + i // 3) % 3]) for i, start in enumerate(starts)]
    finite = torch.tensor([i % 4 != 1 for i in range(count)], device=device)
    rates, decays = [0.01 * (i + 1) for i in range(count)], [0.1 * (i % 2) for i in range(count)]
    scale = torch.tensor(0.7, device=device)
    for step in (1, 2):  # whatever the numbers, whose kernel is made once
        sources = [Noise(1, step, f"w{i}") for i in range(count)]
        scaling: dict[str, Any] = {"loss_scale": 2.0, "clip_value": 0.5, "grad_scale": scale}
        together = [start.clone() for start in starts]
        each: dict[str, Any] = {"rates": rates, "decays": decays}
        descend_together(together, directions, sources, finite=finite, **each, **scaling)
        for i, start in enumerate(starts):
            alone = start.clone()
            one: dict[str, Any] = {"finite": finite[i], "rate": rates[i], "decay": decays[i]}
            descend(alone, directions[i], sources[i], **one, **scaling)
            assert torch.equal(together[i], alone)
            assert torch.equal(alone, start) == (not finite[i] or not start.numel())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_shards_that_descend_together_round_as_the_whole_does(device: str) -> None:
    start, direction = (torch.randn(9, 14, device=device).bfloat16() for _ in range(2))

    def descended(rows: slice, columns: slice) -> Tensor:
        target = start[rows, columns].clone()
        sources = [Noise(1, 2, "w", (rows.start, columns.start), (9, 14)), Noise(1, 2, "other")]
        gradients = [direction[rows, columns].contiguous()] * 2
        finite = torch.ones(2, dtype=torch.bool, device=device)
        each: dict[str, Any] = {"rates": [0.1, 0.1], "decays": [0.0, 0.0]}
        descend_together([target, target.clone()], gradients, sources, finite=finite, **each)
        return target

    whole = descended(slice(0, 9), slice(0, 14))
    assert torch.equal(descended(slice(2, 5), slice(0, 14)), whole[2:5])
    assert torch.equal(descended(slice(4, 9), slice(3, 8)), whole[4:, 3:8])


def test_small_updates_are_not_lost() -> None:
    weight = torch.ones(4096, dtype=torch.bfloat16)
    nearest = weight.clone()
    for step in range(1, 501):
        round_to(weight, weight.float() + 1e-4, seed=0, step=step, name="w")
        nearest.copy_(nearest.float() + 1e-4)
    assert float(nearest.float().mean()) == 1.0  # what stochastic rounding is for
    assert float(weight.float().mean()) == pytest.approx(1.05, abs=1e-3)
