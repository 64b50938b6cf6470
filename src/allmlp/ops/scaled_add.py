"""The scaling of ResMLP's Affine and LayerScale (arXiv 2105.03404, section 2)."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from allmlp.ops.execution import is_plain_training


def scaled_add_reference(
    offset: Float[Tensor, "..."], scale: Float[Tensor, " channels"], x: Float[Tensor, "*batch channels"]
) -> Float[Tensor, "*batch channels"]:
    """`scaled_add` in torch's own operator, whose backward multiplies `x` by one before it uses it."""
    return torch.addcmul(offset, scale, x)


def scaled_add(
    offset: Float[Tensor, "..."], scale: Float[Tensor, " channels"], x: Float[Tensor, "*batch channels"]
) -> Float[Tensor, "*batch channels"]:
    """`y = offset + scale ⊙ x`, one factor a channel: ResMLP's Affine and its residual behind a LayerScale.

    Args:
        offset: one number a channel, or a tensor shaped like `x`.
        scale: one number a channel.
        x: any floating dtype; dtypes may differ, as under autocast.

    Returns:
        A new tensor shaped like `x`, in the dtype torch promotes the three to.
    """
    if is_plain_training(offset, scale, x):
        return _ScaledAdd.apply(offset, scale, x)
    return scaled_add_reference(offset, scale, x)


class _ScaledAdd(torch.autograd.Function):
    """Its backward consists of differentiable operations, so that gradients of any order exist."""

    @staticmethod
    def forward(ctx: Any, offset: Tensor, scale: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(scale, x)
        ctx.offset_shape, ctx.offset_dtype = offset.shape, offset.dtype
        return scaled_add_reference(offset, scale, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        scale, x = ctx.saved_tensors
        needs_offset, needs_scale, needs_x = ctx.needs_input_grad
        return (
            _summed_to(ctx.offset_shape, grad).to(ctx.offset_dtype) if needs_offset else None,
            # A product of one dtype and its conversion take less time than a product of two.
            _summed_to(scale.shape, grad * x.to(grad.dtype)).to(scale.dtype) if needs_scale else None,
            (grad * scale).to(x.dtype) if needs_x else None,
        )


def _summed_to(shape: torch.Size, x: Tensor) -> Tensor:
    """`x`, or its sum over all but the channels: over one axis torch takes half the time of two."""
    # Not flatten(): batches of gradients, as vectorised Jacobians take them, have no rule for that.
    return x if x.shape == shape else x.reshape(-1, x.shape[-1]).sum(0)
