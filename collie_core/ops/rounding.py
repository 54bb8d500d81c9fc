"""Writing fp32 results into parameters: copied into fp32, nearest into fp16, stochastic into bf16.

Rounded to nearest, most updates of a bf16 weight are smaller than half of its last bit and would be lost.
Stochastic rounding goes up with a probability equal to the part that does not fit, so that the mean is
exact (Gupta et al. 2015, arXiv 1502.02551).  The noise is counter-based: a pure function of seed, step,
parameter name and the element's row-major index in the whole tensor.  So replicas and tied copies round
alike, a shard rounds as the whole tensor does, and a resumed run goes on exactly.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

Rule = Callable[..., Tensor]

#: Elements that one thread works on at a time on the CPU, so that intermediate results stay in its cache.
_CHUNK = 1 << 16
#: The same for a GPU without compilation: bounds the temporary memory.
_GPU_CHUNK = 1 << 25


def round_to(
    target: Tensor,
    value: Tensor,
    *,
    seed: int,
    step: int,
    name: str,
    offset: Sequence[int] | None = None,
    global_shape: Sequence[int] | None = None,
    compiled: bool = False,
) -> None:
    """Write fp32 `value` into `target` (the same shape) in place.

    fp32 is copied, fp16 rounded to nearest, bf16 rounded stochastically.  A value that bf16 can hold is
    never changed; infinities stay, NaN stays NaN.

    step, name: make the noise; the parameter's name is that of the whole model, whatever the layout.
    offset, global_shape: where a shard begins in the whole tensor, and its shape (default: target is whole).
    compiled: run one fused kernel made by torch.compile (worth it on CUDA); the result is the same.
    """
    update_elements(
        target,
        _replace,
        [value],
        [],
        seed=seed,
        step=step,
        name=name,
        offset=offset,
        global_shape=global_shape,
        compiled=compiled,
    )


def _replace(_old: Tensor, new: Tensor) -> Tensor:
    return new


def update_elements(
    target: Tensor,
    rule: Rule,
    tensors: Sequence[Tensor],
    scalars: Sequence[Any],
    *,
    seed: int,
    step: int,
    name: str,
    offset: Sequence[int] | None = None,
    global_shape: Sequence[int] | None = None,
    compiled: bool = False,
) -> None:
    """`target ← rule(target, *tensors, *scalars)`, each element by itself, rounded as in `round_to`.

    rule: a module-level function without side effects; it is given `target` as fp32 and returns fp32.
    tensors: of target's shape.  scalars: numbers, 0-d tensors or None.

    It works on a piece at a time, or in one kernel, and so needs no temporary tensor of target's size.
    """
    if target.numel() == 0:
        return
    origin, salt = noise_key(seed, step, name)
    starts, length = _runs(target, offset, global_shape, origin)
    key = torch.full((), salt, dtype=torch.int32, device=target.device)
    contiguous = target if target.is_contiguous() else target.contiguous()
    rows = contiguous.view(-1, length)
    inputs = [tensor.reshape(-1, length) for tensor in tensors]
    if compiled:
        _compiled_elements()(rows, rule, inputs, list(scalars), starts, key)
    else:
        for runs, columns in _pieces(rows):
            piece = [tensor[runs, columns] for tensor in inputs]
            _elements(rows[runs, columns], rule, piece, list(scalars), starts[runs] + columns.start, key)
    if contiguous is not target:
        target.copy_(contiguous)


def _elements(
    target: Tensor,
    rule: Rule,
    tensors: list[Tensor],
    scalars: list[Any],
    starts: Tensor,
    key: Tensor,
) -> None:
    """`update_elements` of rows (runs, length), the first elements of which have the counters `starts`."""
    value = rule(target.float(), *tensors, *scalars)
    if target.dtype == torch.bfloat16:
        columns = torch.arange(target.shape[1], dtype=torch.int32, device=target.device)
        counter = starts.to(torch.int32)[:, None] + columns  # modulo 2**32
        value = stochastic_bfloat16(value, counter, key)
    target.copy_(value)


@cache
def _compiled_elements() -> Callable[..., None]:
    return torch.compile(_elements, dynamic=True)


def _pieces(rows: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of (runs, length) that cover it, each of about one chunk."""
    runs, length = rows.shape
    chunk = _CHUNK * torch.get_num_threads() if rows.device.type == "cpu" else _GPU_CHUNK
    height = max(1, chunk // length)
    for top in range(0, runs, height):
        for left in range(0, length, chunk):
            yield slice(top, top + height), slice(left, min(left + chunk, length))


def _runs(
    target: Tensor, offset: Sequence[int] | None, global_shape: Sequence[int] | None, origin: int
) -> tuple[Tensor, int]:
    """(starts, length): target is a sequence of runs of `length` elements with consecutive global indices;
    starts (int64, one a run) is the index of the first, plus origin."""
    shape = list(target.shape)
    whole = list(global_shape) if global_shape is not None else shape
    first = list(offset) if offset is not None else [0] * len(shape)
    if not len(shape) == len(whole) == len(first) or any(
        o < 0 or o + s > w for s, o, w in zip(shape, first, whole, strict=True)
    ):
        raise ValueError(f"a shard {shape} at {first} is no part of a tensor {whole}")
    inner = len(shape)  # the dimensions from here on lie side by side in the whole tensor too
    while inner > 0:
        inner -= 1
        if shape[inner] != whole[inner]:
            break
    strides = [prod(whole[dim + 1 :]) for dim in range(len(whole))]
    base = origin + sum(begin * stride for begin, stride in zip(first, strides, strict=True))
    starts = torch.full((1,), base, dtype=torch.int64, device=target.device)
    for size, stride in zip(shape[:inner], strides, strict=False):
        places = torch.arange(size, device=target.device) * stride
        starts = (starts[:, None] + places).flatten()
    return starts, prod(shape[inner:])


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
    x = (x ^ _shift(x, 15) ^ key) * (0xD35A2D97 - 2**32)
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
