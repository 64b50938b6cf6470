"""Functions that keep less for backward: what is cheap to compute is computed again.

Autograd keeps a linear map's input for the weight's gradient. Where that input is an activation, a norm, a product or a
rearrangement of something that is kept anyway, it is the larger part of what training remembers and the smaller part of
what it computes.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from allmlp.ops.execution import is_plain_training
from allmlp.ops.linear import linear, linear_bias_gradient, linear_input_gradient, linear_weight_gradient
from allmlp.ops.token_linear import bias_gradient, input_gradient, token_linear, weight_gradient

Across = Literal["channels", "tokens", "earlier tokens"]


class _Map(NamedTuple):
    """A linear map and its gradients."""

    output: Callable[..., Tensor]
    weight_gradient: Callable[[Tensor, Tensor], Tensor]
    bias_gradient: Callable[[Tensor], Tensor]
    input_gradient: Callable[[Tensor, Tensor], Tensor]


_MAPS: dict[Across, _Map] = {
    "channels": _Map(linear, linear_weight_gradient, linear_bias_gradient, linear_input_gradient),
    "tokens": _Map(token_linear, weight_gradient, bias_gradient, input_gradient),
    "earlier tokens": _Map(
        partial(token_linear, causal=True),
        partial(weight_gradient, causal=True),
        bias_gradient,
        partial(input_gradient, causal=True),
    ),
}


def recomputing_linear_reference(
    across: Across,
    prologue: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """`recomputing_linear` with everything kept."""
    return _MAPS[across].output(prologue(*inputs), weight, bias)


def recomputing_linear(
    across: Across,
    prologue: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """`W·prologue(*inputs) + b`, keeping `inputs` for backward and not what `prologue` makes of them.

    Args:
        across: `"channels"`: a linear map of the last dimension; `"tokens"`: `ops.token_linear`; `"earlier tokens"`:
            the causal one.
        prologue: a function of tensors alone, the same at every call; parameters it uses stand among the inputs.
        inputs: what it is given.
        weight: `W`.
        bias: `b`.

    Returns:
        The map's output. Where nothing needs a gradient, and for tracing compilers and functorch, which see to memory
        in their own way, this is the plain form.
    """
    if not is_plain_training(*inputs, weight, bias):
        return recomputing_linear_reference(across, prologue, inputs, weight, bias)
    return _RecomputingLinear.apply(across, prologue, weight, bias, *inputs)


def autocast_state(x: Tensor) -> tuple[str, torch.dtype, bool]:
    """What `torch.autocast` is given to be again in backward as it was in forward."""
    device = x.device.type
    return device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)


def gradients(
    output: Tensor, inputs: Sequence[Tensor], needs: Sequence[bool], grad: Tensor, *, create_graph: bool = False
) -> list[Tensor | None]:
    """Those of the inputs that need one, None for the others."""
    wanted = [x for x, need in zip(inputs, needs, strict=True) if need]
    found = iter(torch.autograd.grad(output, wanted, grad, create_graph=create_graph))
    return [next(found) if need else None for need in needs]


class _RecomputingLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, across: Across, prologue: Callable[..., Tensor], weight: Tensor, bias: Tensor | None, *inputs: Tensor
    ) -> Tensor:
        ctx.across, ctx.prologue, ctx.autocast = across, prologue, autocast_state(inputs[0])
        ctx.save_for_backward(weight, bias, *inputs)
        return recomputing_linear_reference(across, prologue, inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (grad,) = grads
        # Read once: checkpointed blocks give what they kept a single time.
        weight, bias, *inputs = saved = ctx.saved_tensors
        of, (needs_weight, needs_bias, *needs) = _MAPS[ctx.across], ctx.needs_input_grad[2:]
        # With gradients on, gradients of these gradients are wanted: autograd then records the inputs' own graph.
        again = torch.is_grad_enabled()
        with torch.enable_grad(), torch.autocast(*ctx.autocast):
            if again:
                every = ctx.needs_input_grad[2:]
                # Aliases: where one of them depends on another, that way of the gradient is not this function's.
                own = [x.view_as(x) if need else x for x, need in zip(saved, every, strict=True)]
                output = recomputing_linear_reference(ctx.across, ctx.prologue, own[2:], own[0], own[1])
                return None, None, *gradients(output, own, every, grad, create_graph=True)
            inputs = [x.detach().requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
            x = ctx.prologue(*inputs)
        grad_weight = grad_bias = None
        if needs_weight:
            grad_weight = of.weight_gradient(grad, x.detach().to(grad.dtype)).to(weight.dtype)
        if needs_bias:
            grad_bias = of.bias_gradient(grad).sum_to_size(bias.shape).to(bias.dtype)
        grad_inputs: list[Tensor | None] = [None] * len(inputs)
        if any(needs):
            grad_x = of.input_gradient(grad, weight.to(grad.dtype))
            grad_inputs = gradients(x, inputs, needs, grad_x.to(x.dtype))
        return None, None, grad_weight, grad_bias, *grad_inputs
