"""The spatial gating unit's product: gMLP (arXiv 2105.08050), section 2.1.

Shape suffixes: B batch, M tokens written, N tokens read, H spatial heads, E gate channels, P = E / H of one head.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from allmlp.ops.backends import Backend, takes_fused
from allmlp.ops.execution import autocast, is_plain_training
from allmlp.ops.recomputing import autocast_state, gradients
from allmlp.ops.token_linear import bias_gradient, input_gradient, token_linear, weight_gradient


def spatial_gating_reference(
    u: Float[Tensor, "batch written channels"],
    v: Float[Tensor, "batch read channels"],
    weight: Float[Tensor, "*rows heads written read"],
    bias: Float[Tensor, "*#rows heads #written"],
    residual: Float[Tensor, "batch written channels"] | None = None,
    gate_act: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, "batch written channels"]:
    """`spatial_gating` written straight from its equation, one row of the batch and one head at a time."""
    rows = []
    for b, v_NE in enumerate(v):
        w_HMN, b_HM = weight[b] if weight.dim() == 4 else weight, bias[b] if bias.dim() == 3 else bias
        heads = zip(w_HMN, b_HM, v_NE.chunk(w_HMN.shape[0], dim=-1), strict=True)
        rows.append(torch.cat([torch.einsum("mn,np->mp", w_MN, v_NP) + b_M[:, None] for w_MN, b_M, v_NP in heads], -1))
    gate = torch.stack(rows)
    if residual is not None:
        gate = gate + residual
    if gate_act is not None:
        gate = gate_act(gate)
    return u * gate


def spatial_gating(
    u: Float[Tensor, "batch written channels"],
    v: Float[Tensor, "batch read channels"],
    weight: Float[Tensor, "*rows heads written read"],
    bias: Float[Tensor, "*#rows heads #written"],
    residual: Float[Tensor, "batch written channels"] | None = None,
    gate_act: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, "batch written channels"]:
    r"""Gate `u` by a projection of `v` across tokens, `u ⊙ act(W v + b + residual)` (gMLP, eq. 3 and 4).

    Head `h` owns the channels `[h·E/H, (h+1)·E/H)` and has its own `W_h`, `b_h`; `b` is one number a token, shared by
    the channels of its head. The weight multiplies from the left, so no tensor is transposed.

    Args:
        u: what is gated; while decoding only the newest tokens.
        v: the normalised half that the gate is made of; any floating dtype, the dtype of the result.
        weight: `W`, row = token written, column = token read; with four axes each row of the batch has its own.
        bias: `b`; one number for all tokens is enough where a head has a single one.
        residual: added to the gate before its activation (aMLP's tiny attention, figure 6).
        gate_act: the gate's activation; none in the paper.

    Returns:
        The gated tensor, shaped like `u`. Products accumulate in float32 for 16-bit inputs.
    """
    heads = weight.shape[-3]
    if heads == 1 and weight.dim() == 3 and bias.dim() == 2:
        gate = token_linear(v, weight.squeeze(0), bias.squeeze(0))
    elif heads == 1:
        gate = torch.matmul(weight.squeeze(-3), v)
        gate = gate.add_(bias.squeeze(-2).unsqueeze(-1))
    else:
        v_BHNP = v.unflatten(-1, (heads, -1)).transpose(1, 2)
        gate_BHMP = torch.matmul(weight, v_BHNP)
        gate_BHMP = gate_BHMP.add_(bias.unsqueeze(-1))
        gate = gate_BHMP.transpose(1, 2).flatten(2)
    return apply_gate(u, gate, residual, gate_act)


def apply_gate(
    u: Float[Tensor, "batch tokens channels"],
    gate: Float[Tensor, "batch tokens channels"],
    residual: Float[Tensor, "batch tokens channels"] | None = None,
    gate_act: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, "batch tokens channels"]:
    """`u ⊙ act(gate + residual)`. The gate is taken over: it must be a fresh tensor that nobody else reads."""
    if residual is not None:
        gate = gate.add_(residual)
    if gate_act is not None:
        gate = gate_act(gate)
    if torch.is_grad_enabled() or torch.jit.is_tracing() or gate.dtype != u.dtype:
        return u * gate
    # Nothing is kept for backward: the gate's memory serves for the result.
    return gate.mul_(u)


def normalized_spatial_gating_reference(
    u: Float[Tensor, "batch written channels"],
    v: Float[Tensor, "batch read channels"],
    norm_weight: Float[Tensor, " channels"],
    norm_bias: Float[Tensor, " channels"],
    norm_eps: float,
    weight: Float[Tensor, "heads written read"],
    bias: Float[Tensor, " heads #written"],
    *,
    causal: bool = False,
) -> Float[Tensor, "batch written channels"]:
    """`normalized_spatial_gating` written from its equation."""
    centred = v - v.mean(-1, keepdim=True)
    z = centred / (centred.square().mean(-1, keepdim=True) + norm_eps).sqrt() * norm_weight + norm_bias
    return spatial_gating_reference(u, z, weight.tril() if causal else weight, bias)


def normalized_spatial_gating(
    u: Float[Tensor, "batch written channels"],
    v: Float[Tensor, "batch read channels"],
    norm_weight: Float[Tensor, " channels"],
    norm_bias: Float[Tensor, " channels"],
    norm_eps: float,
    weight: Float[Tensor, "heads written read"],
    bias: Float[Tensor, " heads #written"],
    *,
    causal: bool = False,
    backend: Backend = "auto",
) -> Float[Tensor, "batch written channels"]:
    r"""The whole spatial gating unit, `u ⊙ (W·LN(v) + b)` (gMLP, section 2.1), heads as in `spatial_gating`.

    Args:
        u: what is gated.
        v: what the gate is made of; `u` and `v` may be the two halves of one tensor, which are read where they lie.
        norm_weight: the layer norm's scale.
        norm_bias: the layer norm's shift.
        norm_eps: the layer norm's epsilon.
        weight: `W`, row = token written, column = token read.
        bias: `b`; one number for all tokens is enough.
        causal: read tokens `j ≤ i` only. The fused form leaves out the tiles above the diagonal, half of the work, and
            makes no triangular copy of `W`.
        backend: which form runs; see `ops.set_fused`.

    Returns:
        The gated tensor, shaped like `u`.

    Raises:
        ValueError: if `backend` is unknown, or `"triton"` and the kernel cannot run here.
    """
    tensors = (u, v, norm_weight, norm_bias, weight, bias)
    if takes_fused("normalized_spatial_gating", backend, *tensors):
        from allmlp.ops.kernels.spatial_gating import gated_product, token_statistics

        u, v, weight, bias = autocast(u, v, weight, bias)
        mean, rstd = token_statistics(v.detach(), norm_eps)
        return gated_product(u, v, mean, rstd, norm_weight, norm_bias, weight, bias, causal)
    z = F.layer_norm(v, norm_weight.shape, norm_weight, norm_bias, norm_eps)
    return spatial_gating(u, z, weight.tril() if causal else weight, bias)


def activated_spatial_gating_reference(
    x: Float[Tensor, "batch tokens two_channels"],
    norm_weight: Float[Tensor, " channels"],
    norm_bias: Float[Tensor, " channels"],
    norm_eps: float,
    weight: Float[Tensor, "tokens tokens"],
    bias: Float[Tensor, " #tokens"],
    act: Callable[[Tensor], Tensor] = F.gelu,
) -> Float[Tensor, "batch tokens channels"]:
    """`activated_spatial_gating` with everything kept."""
    u, v = act(x).chunk(2, dim=-1)
    return normalized_spatial_gating(u, v, norm_weight, norm_bias, norm_eps, weight[None], bias[None])


def activated_spatial_gating(
    x: Float[Tensor, "batch tokens two_channels"],
    norm_weight: Float[Tensor, " channels"],
    norm_bias: Float[Tensor, " channels"],
    norm_eps: float,
    weight: Float[Tensor, "tokens tokens"],
    bias: Float[Tensor, " #tokens"],
    act: Callable[[Tensor], Tensor] = F.gelu,
) -> Float[Tensor, "batch tokens channels"]:
    """The spatial gating unit with one head and the activation in front of it: `u ⊙ (W·LN(v) + b)`, `(u, v) = act(x)`.

    Backward keeps `x` and the gate, and writes the gradients of both halves where that of `x` will be.

    Args:
        x: a block's expansion.
        norm_weight: the layer norm's scale.
        norm_bias: the layer norm's shift.
        norm_eps: the layer norm's epsilon.
        weight: `W`, row = token written, column = token read.
        bias: `b`; one number for all tokens is enough.
        act: an activation, element by element.

    Returns:
        The gated tensor, as wide as a half. Where nothing is kept for backward, for what reads along, and where
        `normalized_spatial_gating` takes its fused form, this is the plain form.
    """
    tensors = (x, norm_weight, norm_bias, weight, bias)
    if is_plain_training(*tensors) and not takes_fused("normalized_spatial_gating", "auto", *tensors):
        return _ActivatedGating.apply(act, norm_eps, *tensors)
    return activated_spatial_gating_reference(x, norm_weight, norm_bias, norm_eps, weight, bias, act)


class _ActivatedGating(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        act: Callable[[Tensor], Tensor],
        norm_eps: float,
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        weight: Tensor,
        bias: Tensor,
    ) -> Tensor:
        ctx.act, ctx.norm_eps, ctx.autocast = act, norm_eps, autocast_state(x)
        u, v = act(x).chunk(2, dim=-1)
        gate = token_linear(F.layer_norm(v, norm_weight.shape, norm_weight, norm_bias, norm_eps), weight, bias)
        ctx.save_for_backward(x, norm_weight, norm_bias, weight, bias, gate)
        return u * gate

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        *given, gate = ctx.saved_tensors
        x, norm_weight, norm_bias, weight, bias = given
        needs = ctx.needs_input_grad[2:]
        needs_x, _, _, needs_weight, needs_bias = needs
        # With gradients on, gradients of these gradients are wanted: autograd then records the plain form's graph.
        again = torch.is_grad_enabled()
        with torch.enable_grad(), torch.autocast(*ctx.autocast):
            if again:
                out = activated_spatial_gating_reference(x, norm_weight, norm_bias, ctx.norm_eps, weight, bias, ctx.act)
                return None, None, *gradients(out, given, needs, grad, create_graph=True)
            x = x.detach().requires_grad_(needs_x)
            activated = ctx.act(x)
            u, v = activated.detach().chunk(2, dim=-1)
            # The half is a strided view, which the norm and its backward would each copy.
            v, scale, shift = normed = [
                t.detach().requires_grad_(need)
                for t, need in zip((v.contiguous(), norm_weight, norm_bias), needs[:3], strict=True)
            ]
            z = F.layer_norm(v, scale.shape, scale, shift, ctx.norm_eps)
        grad_gate = grad * u
        grad_weight = weight_gradient(grad_gate, z.detach().to(grad_gate.dtype)) if needs_weight else None
        grad_bias = bias_gradient(grad_gate).sum_to_size(bias.shape) if needs_bias else None
        grad_x = grad_v = grad_scale = grad_shift = None
        if any(needs[:3]):
            grad_z = input_gradient(grad_gate, weight.to(grad_gate.dtype)).to(z.dtype)
            grad_v, grad_scale, grad_shift = gradients(z, normed, needs[:3], grad_z)
        if grad_v is not None:
            grad_activated = torch.empty_like(activated)
            grad_u, rest = grad_activated.chunk(2, dim=-1)
            torch.mul(grad, gate, out=grad_u)
            rest.copy_(grad_v)
            (grad_x,) = torch.autograd.grad(activated, x, grad_activated)
        return None, None, grad_x, grad_scale, grad_shift, grad_weight, grad_bias
