"""`ops.permute_linear` without a permuted map: its products read and write through address arithmetic."""

from typing import Any

import torch
from torch import Tensor

from allmlp.ops.kernels import gathered_linear


@torch.library.custom_op("allmlp::permute_linear", mutates_args=())
def permute_linear(x: Tensor, weight: Tensor, bias: Tensor | None, segments: int, axis: str) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    gathered_linear.linear(_matrix(x, segments, axis), weight, bias, _matrix(out, segments, axis))
    return out


@torch.library.custom_op("allmlp::permute_linear_weight_grad", mutates_args=())
def _weight_grad(grad: Tensor, x: Tensor, segments: int, axis: str) -> Tensor:
    return gathered_linear.weight_grad(_matrix(grad, segments, axis), _matrix(x, segments, axis)).to(x.dtype)


def _matrix(x: Tensor, segments: int, axis: str) -> Tensor:
    """For each position of the other axis and each segment a row, for each position of `axis` and channel a column."""
    x_BHWNS = x.unflatten(-1, (segments, -1))
    return x_BHWNS.permute(0, 2, 3, 1, 4) if axis == "height" else x_BHWNS.permute(0, 1, 3, 2, 4)


@permute_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, segments: int, axis: str) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@_weight_grad.register_fake
def _(grad: Tensor, x: Tensor, segments: int, axis: str) -> Tensor:
    size = x.shape[1 if axis == "height" else 2] * (x.shape[3] // segments)
    return x.new_empty((size, size))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.segments, ctx.axis = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, _, _ = ctx.needs_input_grad
    grad_x = permute_linear(grad, weight.t(), None, ctx.segments, ctx.axis) if needs_x else None
    grad_weight = _weight_grad(grad, x, ctx.segments, ctx.axis) if needs_weight else None
    grad_bias = _matrix(grad, ctx.segments, ctx.axis).sum((0, 1, 2)).flatten() if needs_bias else None
    return grad_x, grad_weight, grad_bias, None, None


permute_linear.register_autograd(_backward, setup_context=_setup_context)
