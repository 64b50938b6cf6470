"""The linear map across tokens of MLP-Mixer (arXiv 2105.01601), ResMLP (2105.03404) and gMLP (2105.08050).

Shape suffixes: B batch, M tokens written, N tokens read, C channels.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from allmlp.ops.execution import autocast, is_compiled_inference, is_plain_inference, is_plain_training
from allmlp.ops.products import multiply


def token_linear_reference(
    x: Float[Tensor, "batch read channels"],
    weight: Float[Tensor, "written read"],
    bias: Float[Tensor, "#written"],
    *,
    causal: bool = False,
) -> Float[Tensor, "batch written channels"]:
    """`token_linear` written from its equation."""
    return torch.einsum("mn,bnc->bmc", weight.tril() if causal else weight, x) + bias[:, None]


def token_linear(
    x: Float[Tensor, "batch read channels"],
    weight: Float[Tensor, "written read"],
    bias: Float[Tensor, "#written"],
    *,
    causal: bool = False,
) -> Float[Tensor, "batch written channels"]:
    """`y = W x + b` for every sample and channel: tokens are mixed, `b` is one number a token.

    The weight stands on the left, so no activation is transposed; it is handed to a batched product as a view, because
    `matmul` would fold the batch into the channels by copying the input and the result.

    Args:
        x: any floating dtype.
        weight: `W`, row = token written, column = token read.
        bias: `b`; one number for all tokens is enough.
        causal: token `i` reads tokens `j ≤ i` alone, whatever `W` holds above its diagonal. In long sequences on a CPU
            what lies above is left out block by block, forward and backward.

    Returns:
        A new tensor. Products accumulate in float32 for 16-bit inputs.
    """
    if torch.compiler.is_exporting():
        # Inference engines pack the weights of linear maps, and those alone.
        weight = weight.tril() if causal else weight
        return F.linear(x.transpose(1, 2), weight, bias.expand(weight.shape[0])).transpose(1, 2)
    # Autocast would cast the weight once a sample.
    x, weight, bias = autocast(x, weight, bias)
    if is_plain_training(x, weight, bias):
        return _TokenLinear.apply(x, weight, bias, causal)
    return _product(x, weight, bias, causal)


def weight_gradient(
    grad: Float[Tensor, "batch written channels"], x: Float[Tensor, "batch read channels"], *, causal: bool = False
) -> Float[Tensor, "written read"]:
    """Of `token_linear`, given the output's gradient and the input."""
    if not causal:
        return multiply(_weight_gradient, grad, x)
    if not _gains_by_blocks(x):
        return multiply(_weight_gradient, grad, x).tril()
    total = grad.new_zeros(grad.shape[1], x.shape[1])
    for rows in _blocks(grad.shape[1]):
        total[rows, : rows.stop] = multiply(_weight_gradient, grad[:, rows], x[:, : rows.stop])
    return total.tril_()


def bias_gradient(grad: Float[Tensor, "batch written channels"]) -> Float[Tensor, " written"]:
    """Of `token_linear`, for one number a token."""
    # In one go over both axes torch writes a bfloat16 gradient out in float32 first.
    return grad.sum(2).sum(0)


def input_gradient(
    grad: Float[Tensor, "batch written channels"], weight: Float[Tensor, "written read"], *, causal: bool = False
) -> Float[Tensor, "batch read channels"]:
    """Of `token_linear`, given the output's gradient."""
    if not causal:
        return multiply(_input_gradient, weight, grad)
    if not _gains_by_blocks(grad):
        return multiply(_input_gradient, weight.tril(), grad)
    return torch.cat(
        [
            multiply(_input_gradient, weight[read.start :, read].tril(), grad[:, read.start :])
            for read in _blocks(weight.shape[1])
        ],
        dim=1,
    )


class _TokenLinear(torch.autograd.Function):
    """Its backward consists of differentiable operations, so that gradients of any order exist."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, causal: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_shape, ctx.causal = bias.shape, causal
        return _product(x, weight, bias, causal)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        return (
            input_gradient(grad, weight, causal=ctx.causal) if needs_x else None,
            weight_gradient(grad, x, causal=ctx.causal) if needs_weight else None,
            bias_gradient(grad).sum_to_size(ctx.bias_shape) if needs_bias else None,
            None,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor, causal: bool) -> Tensor:
    if not causal:
        return multiply(_added_product, bias, weight, x)
    if not _gains_by_blocks(x):
        return multiply(_added_product, bias, weight.tril(), x)
    bias = bias.expand(weight.shape[0])
    return torch.cat(
        [
            multiply(_added_product, bias[rows], weight[rows, : rows.stop].tril(rows.start), x[:, : rows.stop])
            for rows in _blocks(weight.shape[0])
        ],
        dim=1,
    )


def _added_product(bias: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    if is_compiled_inference() and x.is_cpu:
        # torch would write the bias out in front of the product; the compiler adds it in what comes behind.
        return torch.bmm(weight.expand(x.shape[0], -1, -1), x) + bias.unsqueeze(-1)
    return torch.baddbmm(bias.unsqueeze(-1), weight.expand(x.shape[0], -1, -1), x)


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    return torch.bmm(grad, x.transpose(1, 2)).sum(0)


def _input_gradient(weight: Tensor, grad: Tensor) -> Tensor:
    return torch.bmm(weight.t().expand(grad.shape[0], -1, -1), grad)


def _gains_by_blocks(x: Tensor) -> bool:
    """Whether a causal product of this input takes less time block by block: it is long, and torch just computes.

    Gradients of gradients are taken of whole products.
    """
    return is_plain_inference() and x.is_cpu and x.shape[1] >= _LONG


def _blocks(tokens: int) -> Iterator[slice]:
    """The tokens a block at a time. Thinner blocks leave out more, and take longer for each number."""
    size = _BLOCK if tokens < _VERY_LONG else 2 * _BLOCK
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))


# Measured by benchmarks/causal.py.
_BLOCK, _LONG, _VERY_LONG = 128, 512, 1024
