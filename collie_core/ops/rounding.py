"""Writing fp32 results into parameters: copied into fp32, nearest into fp16, stochastic into bf16.

Rounded to nearest, most updates of a bf16 weight are smaller than half of its last bit and would be lost.
Stochastic rounding goes up with a probability equal to the part that does not fit, so that the mean is
exact (Gupta et al. 2015, arXiv 1502.02551).  The noise is counter-based: a pure function of seed, step,
parameter name and the element's row-major index in the whole tensor.  So replicas and tied copies round
alike, a shard rounds as the whole tensor does, and a resumed run goes on exactly.

This is the reference in plain PyTorch, and what runs on a CPU; on CUDA the same is one Triton kernel
(`rounding_triton`), since the reference reads and writes a weight about 20 times.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from collie_core.ops import rounding_triton
from collie_core.shard import Shard

Rule = Callable[..., Tensor]

#: Elements that a thread of the CPU works on at a time, so that intermediate results stay in its cache.
_CPU_CHUNK = 1 << 16
#: The same for other devices: bounds the temporary memory.
_DEVICE_CHUNK = 1 << 25


@dataclass(frozen=True)
class Noise:
    """Where the noise of one parameter at one step comes from, and where in it a shard lies.

    step, name: of the optimizer step and of the parameter in the whole model, whatever the layout.
    offset, global_shape: where the shard begins in the whole tensor, and its shape; None: it is the whole.
    """

    seed: int
    step: int
    name: str
    offset: Sequence[int] | None = None
    global_shape: Sequence[int] | None = None

    @classmethod
    def of(cls, seed: int, step: int, shard: Shard) -> Noise:
        """The noise of this rank's part of a parameter."""
        return cls(seed, step, shard.name, shard.offsets, shard.shape)


def round_to(
    target: Tensor,
    value: Tensor,
    *,
    seed: int,
    step: int,
    name: str,
    offset: Sequence[int] | None = None,
    global_shape: Sequence[int] | None = None,
) -> None:
    """Write fp32 `value` into `target` (the same shape) in place; the arguments are those of `Noise`.

    fp32 is copied, fp16 rounded to nearest, bf16 rounded stochastically.  A value that bf16 can hold is
    never changed; infinities stay, NaN stays NaN.
    """
    source = Noise(seed, step, name, offset, global_shape)
    if target.dtype == torch.bfloat16 and rounding_triton.serves(target, value):
        rounding_triton.round_to(target, value, counters(target, source))
    else:
        update_elements(target, _replace, [value], [], source)


def _replace(_old: Tensor, new: Tensor) -> Tensor:
    return new


def update_elements(
    target: Tensor, rule: Rule, tensors: Sequence[Tensor], scalars: Sequence[Any], source: Noise
) -> None:
    """`target ← rule(target, *tensors, *scalars)`, each element by itself, rounded as in `round_to`.

    rule is given `target` as fp32 and returns fp32; tensors have target's shape; scalars may be anything.
    A piece at a time is worked on, so no temporary tensor has target's size.
    """
    if target.numel() == 0:
        return
    stochastic = target.dtype == torch.bfloat16
    length, rounded = _stochastic(target, source) if stochastic else (target.numel(), _unchanged)
    contiguous = target if target.is_contiguous() else target.contiguous()
    rows = contiguous.view(-1, length)
    inputs = [tensor.reshape(rows.shape) for tensor in tensors]
    for runs, columns in _pieces(rows):
        value = rule(rows[runs, columns].float(), *[tensor[runs, columns] for tensor in inputs], *scalars)
        rows[runs, columns] = rounded(value, runs, columns)
    if contiguous is not target:
        target.copy_(contiguous)


def _unchanged(value: Tensor, _runs: slice, _columns: slice) -> Tensor:
    return value


def _stochastic(target: Tensor, source: Noise) -> tuple[int, Callable[[Tensor, slice, slice], Tensor]]:
    """(length of a run, the rounding of a piece of the runs)."""
    place, device = counters(target, source), target.device
    key = torch.full((), place.key, dtype=torch.int32, device=device)
    starts = place.starts if place.starts is not None else torch.zeros(1, dtype=torch.int64, device=device)

    def rounded(value: Tensor, runs: slice, columns: slice) -> Tensor:
        first = (starts[runs, None] + (place.origin + columns.start)).to(torch.int32)  # modulo 2**32
        counter = first + torch.arange(value.shape[1], dtype=torch.int32, device=device)
        return stochastic_bfloat16(value, counter, key)

    return place.length, rounded


def uniform(target: Tensor, source: Noise) -> Tensor:
    """Numbers from [0, 1), fp32, of target's shape: `source`'s noise, for a rounding of one's own."""
    place = counters(target, source)
    key = torch.full((), place.key, dtype=torch.int32, device=target.device)
    starts = place.starts if place.starts is not None else key.new_zeros(1, dtype=torch.int64)
    inside = torch.arange(place.length, device=target.device)
    counter = (starts[:, None] + inside + place.origin).to(torch.int32)
    return (noise(counter, key) / 65536.0).view(target.shape)


def _pieces(rows: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of (runs, length) that cover it, each of about one chunk."""
    runs, length = rows.shape
    chunk = _CPU_CHUNK * torch.get_num_threads() if rows.device.type == "cpu" else _DEVICE_CHUNK
    height = max(1, chunk // length)
    for top in range(0, runs, height):
        for left in range(0, length, chunk):
            yield slice(top, top + height), slice(left, left + chunk)


@dataclass(frozen=True)
class Counters:
    """The counters of a shard's elements in the order of its memory, and the key they are hashed with.

    The shard is a sequence of runs of `length` elements that lie side by side in the whole tensor too;
    element j of run i has the counter origin + starts[i] + j modulo 2**32.
    starts: int64 (runs,), or None for a single run that starts at 0.
    """

    origin: int
    key: int
    length: int
    starts: Tensor | None


def counters(target: Tensor, source: Noise) -> Counters:
    """Raises ValueError where the shard is no part of the whole tensor."""
    shape = tuple(target.shape)
    whole = shape if source.global_shape is None else tuple(source.global_shape)
    offset = (0,) * len(shape) if source.offset is None else tuple(source.offset)
    first, length, outer = _runs(shape, whole, offset)
    origin, key = noise_key(source.seed, source.step, source.name)
    starts = None
    if outer:
        starts = torch.zeros(1, dtype=torch.int64, device=target.device)
        for size, stride in outer:
            places = torch.arange(size, device=target.device) * stride
            starts = (starts[:, None] + places).flatten()
    return Counters(signed(origin + first), key, length, starts)


@lru_cache(maxsize=4096)  # asked for every parameter in every step
def _runs(
    shape: tuple[int, ...], whole: tuple[int, ...], offset: tuple[int, ...]
) -> tuple[int, int, tuple[tuple[int, int], ...]]:
    """(place of the shard's first element in the whole, length of its runs, (size, stride) of each dimension
    along which there are several)."""
    if not len(shape) == len(whole) == len(offset) or any(
        o < 0 or o + s > w for s, o, w in zip(shape, offset, whole, strict=True)
    ):
        raise ValueError(f"a shard {list(shape)} at {list(offset)} is no part of a tensor {list(whole)}")
    inner = len(shape)  # the dimensions from here on make a run
    while inner > 0:
        inner -= 1
        if shape[inner] != whole[inner]:
            break
    strides = [prod(whole[dim + 1 :]) for dim in range(len(whole))]
    first = sum(begin * stride for begin, stride in zip(offset, strides, strict=True))
    return first, prod(shape[inner:]), tuple(zip(shape[:inner], strides, strict=False))


def signed(number: int) -> int:
    """The signed 32-bit integer that equals number modulo 2**32."""
    return (number + 2**31) % 2**32 - 2**31


def noise_key(seed: int, step: int, name: str) -> tuple[int, int]:
    """(origin, key) of the noise: signed 32-bit numbers that differ for every seed, step and name."""
    digest = hashlib.blake2b(f"{seed}/{step}/{name}".encode(), digest_size=8).digest()
    origin, key = struct.unpack("<ii", digest)
    return origin, key


def noise(counter: Tensor, key: Tensor) -> Tensor:
    """Uniform integers 0..65535 (int32) for counters, which are origin + element index (int32, modulo 2**32).

    The mixing is the integer hash of C. Wellons' hash-prospector with the lowest known bias for two
    multiplications ([16 21f0aaad 15 d35a2d97 15], https://github.com/skeeto/hash-prospector), the key (0-d,
    int32) being mixed in half-way.  int32 arithmetic wraps around on every device.
    """
    x = (counter ^ _shift(counter, 16)) * 0x21F0AAAD
    x = (x ^ _shift(x, 15) ^ key) * signed(0xD35A2D97)
    return (x ^ (x >> 15)) & 0xFFFF


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; the operator alone would copy the sign bit of int32."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def stochastic_bfloat16(value: Tensor, counter: Tensor, key: Tensor) -> Tensor:
    """fp32 `value` as bf16: noise below the last kept bit, then the rest cut off.

    An fp32 number is a bf16 number followed by 16 bits; adding 0..65535 to the bits carries into the kept
    ones with probability (cut bits) / 65536, for subnormals and over the border of an exponent too.
    """
    inf = float("inf")
    value = value.nan_to_num(float("nan"), inf, -inf)  # one NaN for all: the bits of another could carry over
    bits = (value.view(torch.int32) + noise(counter, key)) & -0x10000
    return bits.view(torch.float32).to(torch.bfloat16)
