"""The linear map across tokens of MLP-Mixer (arXiv 2105.01601), ResMLP (2105.03404) and gMLP (2105.08050).

Shape suffixes: B batch, M tokens written, N tokens read, C channels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from allmlp.ops.execution import autocast, is_compiled_inference, is_plain_training
from allmlp.ops.products import multiply


def token_linear_reference(
    x: Float[Tensor, "batch read channels"],
    weight: Float[Tensor, "written read"],
    bias: Float[Tensor, "#written"],
) -> Float[Tensor, "batch written channels"]:
    """`token_linear` written from its equation."""
    return torch.einsum("mn,bnc->bmc", weight, x) + bias[:, None]


def token_linear(
    x: Float[Tensor, "batch read channels"],
    weight: Float[Tensor, "written read"],
    bias: Float[Tensor, "#written"],
) -> Float[Tensor, "batch written channels"]:
    """`y = W x + b` for every sample and channel: tokens are mixed, `b` is one number a token.

    The weight stands on the left, so no activation is transposed; it is handed to a batched product as a view, because
    `matmul` would fold the batch into the channels by copying the input and the result.

    Args:
        x: any floating dtype.
        weight: `W`, row = token written, column = token read.
        bias: `b`; one number for all tokens is enough.

    Returns:
        A new tensor. Products accumulate in float32 for 16-bit inputs.
    """
    if torch.compiler.is_exporting():
        # Inference engines pack the weights of linear maps, and those alone.
        return F.linear(x.transpose(1, 2), weight, bias.expand(weight.shape[0])).transpose(1, 2)
    # Autocast would cast the weight once a sample.
    x, weight, bias = autocast(x, weight, bias)
    if is_plain_training(x, weight, bias):
        return _TokenLinear.apply(x, weight, bias)
    return _product(x, weight, bias)


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """Of `token_linear`, given the output's gradient and the input."""
    return multiply(lambda grad, x: torch.bmm(grad, x.transpose(1, 2)).sum(0), grad, x)


def bias_gradient(grad: Tensor) -> Tensor:
    """Of `token_linear`, for one number a token."""
    # In one go over both axes torch writes a bfloat16 gradient out in float32 first.
    return grad.sum(2).sum(0)


def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """Of `token_linear`."""
    return multiply(lambda weight, grad: torch.bmm(weight.t().expand(grad.shape[0], -1, -1), grad), weight, grad)


class _TokenLinear(torch.autograd.Function):
    """Its backward consists of differentiable operations, so that gradients of any order exist."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_shape = bias.shape
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            input_gradient(grad, weight) if needs_x else None,
            weight_gradient(grad, x) if needs_weight else None,
            bias_gradient(grad).sum_to_size(ctx.bias_shape) if needs_bias else None,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return multiply(_added_product, bias, weight, x)


def _added_product(bias: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    if is_compiled_inference() and x.is_cpu:
        # torch would write the bias out in front of the product; the compiler adds it in what comes behind.
        return torch.bmm(weight.expand(x.shape[0], -1, -1), x) + bias.unsqueeze(-1)
    return torch.baddbmm(bias.unsqueeze(-1), weight.expand(x.shape[0], -1, -1), x)
