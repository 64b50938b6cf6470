"""The spatial gating unit's product: gMLP (arXiv 2105.08050), section 2.1.

Shape suffixes: B batch, M tokens written, N tokens read, H spatial heads, E gate channels, P = E / H of one head.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from allmlp.ops.token_linear import token_linear


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
