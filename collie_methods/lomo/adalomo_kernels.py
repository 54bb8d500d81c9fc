# mypy: ignore-errors
"""Triton kernels of `adalomo_triton`.

Imported only where Triton is used, which reads the functions' source and annotations: so no types here.
A tile is ROWS x COLUMNS elements of a matrix.
"""

import triton
import triton.language as tl

from collie_core.ops.rounding_kernels import _counter, _number, _stochastic_bfloat16, _true_gradient


@triton.jit
def _tile(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(rows, columns, first element, offsets from it, which are inside)."""
    r, c = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    top, left = tl.program_id(0) * ROWS, tl.program_id(1) * COLUMNS
    inside = (top + r < rows)[:, None] & (left + c < columns)[None, :]
    return top + r, left + c, top.to(tl.int64) * columns + left, r[:, None] * columns + c[None, :], inside


@triton.jit
def _update(g, by_row, by_column, r, c, rows, columns):
    """U of a tile of the gradient."""
    return g * tl.load(by_row + r, r < rows)[:, None] * tl.load(by_column + c, c < columns)[None, :]


@triton.jit(do_not_specialize=["grad_scale"])
def moments(
    gradient,
    of_rows,
    of_columns,
    rows,
    columns,
    loss_scale,
    clip_value,
    grad_scale,
    grad_scale_pointer,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    r, c, first, offset, inside = _tile(rows, columns, ROWS, COLUMNS)
    place = gradient + first + offset
    g = _true_gradient(place, inside, loss_scale, clip_value, grad_scale, grad_scale_pointer)
    square = g * g
    tl.store(of_rows + tl.program_id(1) * rows + r, tl.sum(square, 1), r < rows)
    tl.store(of_columns + tl.program_id(0) * columns + c, tl.sum(square, 0), c < columns)


@triton.jit(do_not_specialize=["grad_scale"])
def squares(
    target,
    gradient,
    by_row,
    by_column,
    of_update,
    of_target,
    rows,
    columns,
    loss_scale,
    clip_value,
    grad_scale,
    grad_scale_pointer,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    r, c, first, offset, inside = _tile(rows, columns, ROWS, COLUMNS)
    place = gradient + first + offset
    g = _true_gradient(place, inside, loss_scale, clip_value, grad_scale, grad_scale_pointer)
    u = tl.where(inside, _update(g, by_row, by_column, r, c, rows, columns), 0.0)
    p = tl.load(target + first + offset, inside, 0.0).to(tl.float32)
    tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(of_update + tile, tl.sum(tl.sum(u * u, 1), 0))
    tl.store(of_target + tile, tl.sum(tl.sum(p * p, 1), 0))


@triton.jit(do_not_specialize=["grad_scale", "decay", "length", "origin", "key"])
def descend(
    target,
    gradient,
    by_row,
    by_column,
    finite,
    rate,
    decay,
    decay_pointer,
    rows,
    columns,
    loss_scale,
    clip_value,
    grad_scale,
    grad_scale_pointer,
    starts,
    length,
    origin,
    key,
    STOCHASTIC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    if tl.load(finite):
        r, c, first, offset, inside = _tile(rows, columns, ROWS, COLUMNS)
        place = gradient + first + offset
        g = _true_gradient(place, inside, loss_scale, clip_value, grad_scale, grad_scale_pointer)
        u = _update(g, by_row, by_column, r, c, rows, columns)
        old = tl.load(target + first + offset, inside, 0.0).to(tl.float32)
        new = old * (1.0 - _number(decay, decay_pointer)) - tl.load(rate) * u
        if STOCHASTIC:
            counter = _counter(first, offset, starts, length, origin, inside)
            tl.store(target + first + offset, _stochastic_bfloat16(new, counter, key), inside)
        else:
            tl.store(target + first + offset, new.to(target.dtype.element_ty), inside)
