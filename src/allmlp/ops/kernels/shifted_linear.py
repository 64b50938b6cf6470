"""Linear maps of shifted maps: channels are read from where the shift takes them, no shifted map is written."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from allmlp.ops.kernels import gathered_linear
from allmlp.ops.kernels.gathered_linear import Shift, read, steps, strides


@torch.library.custom_op("allmlp::shifted_linear", mutates_args=())
def shifted_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    starts: Sequence[int],
    down: Sequence[int],
    right: Sequence[int],
    clamp: bool,
) -> Tensor:
    out = torch.empty((*x.shape[:3], weight.shape[0]), dtype=x.dtype, device=x.device)
    shift = Shift(tuple(starts), tuple(down), tuple(right), clamp)
    gathered_linear.linear(x.unsqueeze(3), weight, bias, out.unsqueeze(3), shift)
    return out


@torch.library.custom_op("allmlp::shifted_linear_weight_grad", mutates_args=())
def _weight_grad(
    grad: Tensor, x: Tensor, starts: Sequence[int], down: Sequence[int], right: Sequence[int], clamp: bool
) -> Tensor:
    shift = Shift(tuple(starts), tuple(down), tuple(right), clamp)
    return gathered_linear.weight_grad(grad.unsqueeze(3), x.unsqueeze(3), shift).to(x.dtype)


@torch.library.custom_op("allmlp::shift_adjoint", mutates_args=())
def _shift_adjoint(
    grad: Tensor, starts: Sequence[int], down: Sequence[int], right: Sequence[int], clamp: bool
) -> Tensor:
    """The transpose of the shift: each value goes back to where it was read from, two meet at a repeated border."""
    out = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    _, height, width, channels = grad.shape
    rows, columns = grad.shape[:3].numel(), min(64, triton.next_power_of_2(channels))
    up, left = tuple(-step for step in down), tuple(-step for step in right)
    with torch.cuda.device_of(grad):
        _adjoint[(triton.cdiv(rows, 64), triton.cdiv(channels, columns))](
            grad, *strides(grad.unsqueeze(3)), out, rows, height, width, channels,
            tuple(starts), tuple(down), tuple(right), up, left, clamp, 64, columns,
        )  # fmt: skip
    return out


@shifted_linear.register_fake
def _(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
    return x.new_empty((*x.shape[:3], weight.shape[0]))


@_weight_grad.register_fake
def _(grad: Tensor, x: Tensor, *shift: Any) -> Tensor:
    return x.new_empty((grad.shape[3], x.shape[3]))


@_shift_adjoint.register_fake
def _(grad: Tensor, *shift: Any) -> Tensor:
    return torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, *ctx.shift = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    # Each element of this product goes to another place, where that of a border meets a second one: torch multiplies,
    # and a pass over the map moves.
    grad_x = _shift_adjoint(grad @ weight, *ctx.shift) if needs_x else None
    grad_weight = _weight_grad(grad, x, *ctx.shift) if needs_weight else None
    grad_bias = grad.sum((0, 1, 2)) if needs_bias else None
    return grad_x, grad_weight, grad_bias, None, None, None, None


shifted_linear.register_autograd(_backward, setup_context=_setup_context)


@triton.jit
def _adjoint(
    grad, grad_strides, STEP: tl.constexpr, out, rows, P, Q, C: tl.constexpr,
    STARTS: tl.constexpr, DOWN: tl.constexpr, RIGHT: tl.constexpr, UP: tl.constexpr, LEFT: tl.constexpr,
    CLAMP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    value = read(grad, grad_strides, STEP, row, column, rows, C, P, Q, C, STARTS, UP, LEFT, False)
    if CLAMP:
        # A group moves along one axis; the border that it moves away from was also read in its own place.
        p = (row // Q % P)[:, None] - steps(column, STARTS, DOWN)[None, :]
        q = (row % Q)[:, None] - steps(column, STARTS, RIGHT)[None, :]
        border = (p < 0) | (p >= P) | (q < 0) | (q >= Q)
        own = read(grad, grad_strides, STEP, row, column, rows, C, P, Q, C, (), (), (), False)
        value = value.to(tl.float32) + tl.where(border, own, 0.0).to(tl.float32)
    inside = (row < rows)[:, None] & (column < C)[None, :]
    place = row.to(tl.int64)[:, None] * C + column[None, :]
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)
