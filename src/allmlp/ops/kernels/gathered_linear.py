"""Products with a matrix that lies in memory in no matrix's order: what shifted and permuted linear maps share.

A matrix is a view of five dimensions (a, p, q, o, s): its rows are the triples (a, p, q), its columns the pairs (o, s).
Groups of columns may be moved: row (a, p, q) then reads them at (a, p − down, q − right).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from allmlp.ops.kernels.precision import factor_dtype, input_precision


class Shift(NamedTuple):
    """Groups of columns, each from its first column to the next group's, and how far each is moved."""

    starts: tuple[int, ...] = ()
    down: tuple[int, ...] = ()
    right: tuple[int, ...] = ()
    # What lies outside the map: the nearest element inside, or zero.
    clamp: bool = False


UNMOVED = Shift()

# Steps of a sum that are worth a program of their own.
FEWEST_STEPS = 8


class Blocks(NamedTuple):
    """The tile of the result that one program computes, and how much of the sum it takes at a time."""

    rows: int
    columns: int
    depth: int
    warps: int


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, shift: Shift = UNMOVED) -> None:
    """Write `x Wᵀ + b` to `out`.

    Args:
        x: a matrix as above.
        weight: `W`, of any strides.
        bias: `b`.
        out: a matrix as above, with the rows of `x`.
        shift: of the columns of `x`.

    Raises:
        ValueError: if weight or bias do not fit.
    """
    rows, columns, outputs = x.shape[:3].numel(), x.shape[3:].numel(), out.shape[3:].numel()
    if weight.shape != (outputs, columns):
        raise ValueError(f"weight must be shaped {(outputs, columns)}, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"bias must be shaped {(outputs,)}, got {tuple(bias.shape)}")
    blocks = choose_blocks(rows, outputs, x.dtype)
    grid = (triton.cdiv(rows, blocks.rows) * triton.cdiv(outputs, blocks.columns),)
    with torch.cuda.device_of(x):
        _linear[grid](
            x, *strides(x), weight, weight.stride(), bias, 0 if bias is None else bias.stride(0), out, *strides(out),
            rows, columns, outputs, x.shape[1], x.shape[2], x.shape[4], out.shape[4], *shift,
            factor_dtype(x.dtype), input_precision(), blocks.rows, blocks.columns, blocks.depth, num_warps=blocks.warps,
        )  # fmt: skip


def weight_grad(grad: Tensor, x: Tensor, shift: Shift = UNMOVED) -> Tensor:
    """`Gᵀ x` in float32, summed over the rows: the gradient of `linear`'s weight where `grad` is that of its result."""
    rows, outputs, columns = x.shape[:3].numel(), grad.shape[3:].numel(), x.shape[3:].numel()
    blocks = choose_blocks(outputs, columns, x.dtype)
    tiles = triton.cdiv(outputs, blocks.rows) * triton.cdiv(columns, blocks.columns)
    # There are many rows and few tiles: several programs share a tile's sum, and their parts are added up in a fixed
    # order, which atomic additions would not keep.
    steps = triton.cdiv(rows, blocks.depth)
    steps_of_part = triton.cdiv(steps, max(1, min(choose_programs(x) // tiles, steps // FEWEST_STEPS)))
    parts = triton.cdiv(steps, max(1, steps_of_part))
    sums = torch.empty((parts, outputs, columns), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _weight_grad[(tiles, parts)](
            grad, *strides(grad), x, *strides(x), sums,
            rows, columns, outputs, x.shape[1], x.shape[2], x.shape[4], grad.shape[4], steps_of_part * blocks.depth,
            *shift, factor_dtype(x.dtype), input_precision(), blocks.rows, blocks.columns, blocks.depth,
            num_warps=blocks.warps,
        )  # fmt: skip
    return sums.sum(0)


def choose_blocks(rows: int, columns: int, dtype: torch.dtype) -> Blocks:
    """Tiles for a result of this size."""
    largest = 64 if dtype == torch.float32 else 128
    tile_rows, tile_columns = (min(largest, max(16, triton.next_power_of_2(size))) for size in (rows, columns))
    return Blocks(tile_rows, tile_columns, 32, warps=8 if tile_rows * tile_columns > 64 * 64 else 4)


def choose_programs(x: Tensor) -> int:
    """How many programs keep the device busy."""
    return 2 * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2


def strides(x: Tensor) -> tuple[tuple[int, int, int, int], int]:
    """Of a, p, o and s; and that of q, which kernels are compiled for.

    A step along q is a few channels or all of them: whether it is a multiple of eight decides how much is read at once.
    """
    a, p, q, o, s = x.stride()
    return (a, p, o, s), q


@triton.jit
def steps(column, STARTS: tl.constexpr, MOVES: tl.constexpr):
    """How far each of these columns is moved."""
    step = tl.zeros_like(column)
    for group in tl.static_range(len(STARTS)):
        step = tl.where(column >= STARTS[group], MOVES[group], step)
    return step


@triton.jit
def read(
    x, strides, STEP: tl.constexpr, row, column, rows, columns, P, Q, S: tl.constexpr,
    STARTS: tl.constexpr, DOWN: tl.constexpr, RIGHT: tl.constexpr, CLAMP: tl.constexpr,
):  # fmt: skip
    """The elements of these rows and columns, zero where there are none."""
    a, p, q = row // (P * Q), (row // Q % P)[:, None], (row % Q)[:, None]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    if len(STARTS) > 0:
        p = p - steps(column, STARTS, DOWN)[None, :]
        q = q - steps(column, STARTS, RIGHT)[None, :]
        if CLAMP:
            p = tl.minimum(tl.maximum(p, 0), P - 1)
            q = tl.minimum(tl.maximum(q, 0), Q - 1)
        else:
            inside = inside & (p >= 0) & (p < P) & (q >= 0) & (q < Q)
    of_row = (x + a.to(tl.int64) * strides[0])[:, None] + p * strides[1] + q * STEP
    of_column = column // S * strides[2] + column % S * strides[3]
    return tl.load(of_row + of_column[None, :], mask=inside, other=0.0)


@triton.jit
def _linear(
    x, x_strides, X_STEP: tl.constexpr, weight, weight_strides, bias, bias_stride,
    out, out_strides, OUT_STEP: tl.constexpr,
    rows, columns, outputs, P, Q, S: tl.constexpr, S_OUT: tl.constexpr,
    STARTS: tl.constexpr, DOWN: tl.constexpr, RIGHT: tl.constexpr, CLAMP: tl.constexpr,
    FACTOR: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs read the same rows of x, which are more than those of the weight.
    tiles = tl.cdiv(outputs, OUTPUTS)
    row = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    output = tl.program_id(0) % tiles * OUTPUTS + tl.arange(0, OUTPUTS)
    total = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
    for start in range(0, columns, DEPTH):
        column = start + tl.arange(0, DEPTH)
        x_tile = read(x, x_strides, X_STEP, row, column, rows, columns, P, Q, S, STARTS, DOWN, RIGHT, CLAMP)
        weight_tile = tl.load(
            weight + output[None, :] * weight_strides[0] + column[:, None] * weight_strides[1],
            mask=(output < outputs)[None, :] & (column < columns)[:, None],
            other=0.0,
        )
        total = tl.dot(x_tile.to(FACTOR), weight_tile.to(FACTOR), total, input_precision=PRECISION)
    if bias is not None:
        total += tl.load(bias + output * bias_stride, mask=output < outputs, other=0.0).to(tl.float32)[None, :]
    of_row = out + (row // (P * Q)).to(tl.int64) * out_strides[0]
    of_row += row // Q % P * out_strides[1] + row % Q * OUT_STEP
    of_output = output // S_OUT * out_strides[2] + output % S_OUT * out_strides[3]
    inside = (row < rows)[:, None] & (output < outputs)[None, :]
    tl.store(of_row[:, None] + of_output[None, :], total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _weight_grad(
    grad, grad_strides, GRAD_STEP: tl.constexpr, x, x_strides, X_STEP: tl.constexpr, sums,
    rows, columns, outputs, P, Q, S: tl.constexpr, S_OUT: tl.constexpr, rows_of_part,
    STARTS: tl.constexpr, DOWN: tl.constexpr, RIGHT: tl.constexpr, CLAMP: tl.constexpr,
    FACTOR: tl.constexpr, PRECISION: tl.constexpr, OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(columns, COLUMNS)
    output = tl.program_id(0) // tiles * OUTPUTS + tl.arange(0, OUTPUTS)
    column = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * rows_of_part
    total = tl.zeros((OUTPUTS, COLUMNS), dtype=tl.float32)
    for start in range(first, tl.minimum(first + rows_of_part, rows), DEPTH):
        row = start + tl.arange(0, DEPTH)
        grad_tile = read(grad, grad_strides, GRAD_STEP, row, output, rows, outputs, P, Q, S_OUT, (), (), (), False)
        x_tile = read(x, x_strides, X_STEP, row, column, rows, columns, P, Q, S, STARTS, DOWN, RIGHT, CLAMP)
        total = tl.dot(tl.trans(grad_tile).to(FACTOR), x_tile.to(FACTOR), total, input_precision=PRECISION)
    sums += tl.program_id(1).to(tl.int64) * outputs * columns
    inside = (output < outputs)[:, None] & (column < columns)[None, :]
    tl.store(sums + output[:, None] * columns + column[None, :], total, mask=inside)
