"""`ops.pool_branches` and `ops.split_attention` over three branches, each map read once where it lies.

Shape suffixes: B batch, H height, W width, C channels; a position is a place on the map, row by row.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


def choose_blocks(channels: int) -> tuple[int, int]:
    """Positions and channels of the tile that a program holds at a time."""
    return 32, min(64, max(16, triton.next_power_of_2(channels)))


@torch.library.custom_op("allmlp::pool_branches", mutates_args=())
def pool_branches(x1: Tensor, x2: Tensor, x3: Tensor) -> Tensor:
    """The mean over positions of the sum of the branches."""
    batch, height, width, channels = x1.shape
    rows, columns = choose_blocks(channels)
    out = torch.empty((batch, channels), dtype=x1.dtype, device=x1.device)
    with torch.cuda.device_of(x1):
        _pool[(batch * triton.cdiv(channels, columns),)](
            out, *_places(x1), *_places(x2), *_places(x3), height * width, width, channels, ROWS=rows, COLUMNS=columns
        )
    return out


@torch.library.custom_op("allmlp::weigh_branches", mutates_args=())
def weigh_branches(x1: Tensor, x2: Tensor, x3: Tensor, logits: Tensor) -> Tensor:
    """The sum of the branches, weighted by the softmax of the logits across them."""
    batch, height, width, channels = x1.shape
    rows, columns = choose_blocks(channels)
    out = torch.empty(x1.shape, dtype=x1.dtype, device=x1.device)
    grid = (batch * triton.cdiv(height * width, rows) * triton.cdiv(channels, columns),)
    with torch.cuda.device_of(x1):
        _weigh[grid](
            out, *_places(x1), *_places(x2), *_places(x3), logits, *logits.stride(),
            height * width, width, channels, ROWS=rows, COLUMNS=columns,
        )  # fmt: skip
    return out


@torch.library.custom_op("allmlp::weigh_branches_backward", mutates_args=())
def _weigh_backward(
    grad: Tensor, x1: Tensor, x2: Tensor, x3: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, height, width, channels = x1.shape
    rows, columns = choose_blocks(channels)
    grad = grad.contiguous()
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (x1, x2, x3)]
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    with torch.cuda.device_of(x1):
        _weigh_grad[(batch * triton.cdiv(channels, columns),)](
            *grads, grad_logits, grad, *_places(x1), *_places(x2), *_places(x3), logits, *logits.stride(),
            height * width, width, channels, ROWS=rows, COLUMNS=columns,
        )  # fmt: skip
    return grads[0], grads[1], grads[2], grad_logits


@pool_branches.register_fake
def _(x1: Tensor, x2: Tensor, x3: Tensor) -> Tensor:
    return x1.new_empty((x1.shape[0], x1.shape[-1]))


@weigh_branches.register_fake
def _(x1: Tensor, x2: Tensor, x3: Tensor, logits: Tensor) -> Tensor:
    return x1.new_empty(x1.shape)


@_weigh_backward.register_fake
def _(grad: Tensor, x1: Tensor, x2: Tensor, x3: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x1.new_empty(x1.shape), x2.new_empty(x2.shape), x3.new_empty(x3.shape), logits.new_empty(logits.shape)


def _setup_pool(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.shape = inputs[0].shape
    ctx.dtypes = [x.dtype for x in inputs]


def _backward_pool(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    # One number for all positions of a channel: nothing is written.
    share = (grad / (ctx.shape[1] * ctx.shape[2]))[:, None, None, :].expand(ctx.shape)
    return tuple(share.to(dtype) for dtype in ctx.dtypes)


def _setup_weigh(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_weigh(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    return _weigh_backward(grad, *ctx.saved_tensors)


pool_branches.register_autograd(_backward_pool, setup_context=_setup_pool)
weigh_branches.register_autograd(_backward_weigh, setup_context=_setup_weigh)


def _places(x: Tensor) -> tuple[Tensor, int, int, int]:
    """A map whose channels lie side by side, and its other strides."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x, x.stride(0), x.stride(1), x.stride(2)


@triton.jit
def _read(x, x_batch, x_row, x_column, batch, position, width, c, inside):
    place = x + batch * x_batch + (position // width * x_row + position % width * x_column)[:, None]
    return tl.load(place + c[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _shares(logits, logits_batch, logits_branch, logits_channel, batch, c, inside_c):
    """The softmax across the branches."""
    logits += batch * logits_batch + c * logits_channel
    l1 = tl.load(logits, mask=inside_c, other=0.0).to(tl.float32)
    l2 = tl.load(logits + logits_branch, mask=inside_c, other=0.0).to(tl.float32)
    l3 = tl.load(logits + 2 * logits_branch, mask=inside_c, other=0.0).to(tl.float32)
    largest = tl.maximum(l1, tl.maximum(l2, l3))
    e1, e2, e3 = tl.exp(l1 - largest), tl.exp(l2 - largest), tl.exp(l3 - largest)
    total = e1 + e2 + e3
    return e1 / total, e2 / total, e3 / total


@triton.jit
def _pool(
    out, x1, x1_batch, x1_row, x1_column, x2, x2_batch, x2_row, x2_column, x3, x3_batch, x3_row, x3_column,
    positions, width, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(channels, COLUMNS)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    c = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    inside_c = c < channels
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, positions, ROWS):
        position = start + tl.arange(0, ROWS)
        inside = (position < positions)[:, None] & inside_c[None, :]
        total += _read(x1, x1_batch, x1_row, x1_column, batch, position, width, c, inside)
        total += _read(x2, x2_batch, x2_row, x2_column, batch, position, width, c, inside)
        total += _read(x3, x3_batch, x3_row, x3_column, batch, position, width, c, inside)
    mean = tl.sum(total, axis=0) / positions
    tl.store(out + batch * channels + c, mean.to(out.dtype.element_ty), mask=inside_c)


@triton.jit
def _weigh(
    out, x1, x1_batch, x1_row, x1_column, x2, x2_batch, x2_row, x2_column, x3, x3_batch, x3_row, x3_column,
    logits, logits_batch, logits_branch, logits_channel,
    positions, width, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row_tiles, column_tiles = tl.cdiv(positions, ROWS), tl.cdiv(channels, COLUMNS)
    batch = (tl.program_id(0) // (row_tiles * column_tiles)).to(tl.int64)
    position = tl.program_id(0) // column_tiles % row_tiles * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    inside_c = c < channels
    inside = (position < positions)[:, None] & inside_c[None, :]
    w1, w2, w3 = _shares(logits, logits_batch, logits_branch, logits_channel, batch, c, inside_c)
    total = w1[None, :] * _read(x1, x1_batch, x1_row, x1_column, batch, position, width, c, inside)
    total += w2[None, :] * _read(x2, x2_batch, x2_row, x2_column, batch, position, width, c, inside)
    total += w3[None, :] * _read(x3, x3_batch, x3_row, x3_column, batch, position, width, c, inside)
    out += batch * positions * channels
    tl.store(out + position[:, None] * channels + c[None, :], total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _weigh_grad(
    grad_x1, grad_x2, grad_x3, grad_logits, grad,
    x1, x1_batch, x1_row, x1_column, x2, x2_batch, x2_row, x2_column, x3, x3_batch, x3_row, x3_column,
    logits, logits_batch, logits_branch, logits_channel,
    positions, width, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(channels, COLUMNS)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    c = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    inside_c = c < channels
    w1, w2, w3 = _shares(logits, logits_batch, logits_branch, logits_channel, batch, c, inside_c)
    # What each weight adds to the result, tile by tile of positions; summed over positions in the end.
    total1 = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    total2 = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    total3 = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, positions, ROWS):
        position = start + tl.arange(0, ROWS)
        inside = (position < positions)[:, None] & inside_c[None, :]
        place = (batch * positions + position)[:, None] * channels + c[None, :]
        dy = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        total1 += dy * _read(x1, x1_batch, x1_row, x1_column, batch, position, width, c, inside)
        total2 += dy * _read(x2, x2_batch, x2_row, x2_column, batch, position, width, c, inside)
        total3 += dy * _read(x3, x3_batch, x3_row, x3_column, batch, position, width, c, inside)
        tl.store(grad_x1 + place, (w1[None, :] * dy).to(grad_x1.dtype.element_ty), mask=inside)
        tl.store(grad_x2 + place, (w2[None, :] * dy).to(grad_x2.dtype.element_ty), mask=inside)
        tl.store(grad_x3 + place, (w3[None, :] * dy).to(grad_x3.dtype.element_ty), mask=inside)
    s1, s2, s3 = tl.sum(total1, axis=0), tl.sum(total2, axis=0), tl.sum(total3, axis=0)
    mean = w1 * s1 + w2 * s2 + w3 * s3
    place = grad_logits + batch * 3 * channels + c
    tl.store(place, (w1 * (s1 - mean)).to(grad_logits.dtype.element_ty), mask=inside_c)
    tl.store(place + channels, (w2 * (s2 - mean)).to(grad_logits.dtype.element_ty), mask=inside_c)
    tl.store(place + 2 * channels, (w3 * (s3 - mean)).to(grad_logits.dtype.element_ty), mask=inside_c)
