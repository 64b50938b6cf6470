"""The spatial gating unit's product: gMLP (arXiv 2105.08050), section 2.1.

Shape suffixes: B batch, N tokens, H spatial heads, E gate channels, P = E / H channels of one head.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


def spatial_gating_reference(
    u: Float[Tensor, "batch tokens channels"],
    v: Float[Tensor, "batch tokens channels"],
    weight: Float[Tensor, "heads tokens tokens"],
    bias: Float[Tensor, "heads tokens"],
    residual: Float[Tensor, "batch tokens channels"] | None = None,
    gate_act: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, "batch tokens channels"]:
    """`spatial_gating` written straight from its equation, one head at a time."""
    gates = []
    for w_NN, b_N, v_BNP in zip(weight, bias, v.chunk(weight.shape[0], dim=-1), strict=True):
        gates.append(torch.einsum("mn,bnp->bmp", w_NN, v_BNP) + b_N[:, None])
    gate = torch.cat(gates, dim=-1)
    if residual is not None:
        gate = gate + residual
    if gate_act is not None:
        gate = gate_act(gate)
    return u * gate


def spatial_gating(
    u: Float[Tensor, "batch tokens channels"],
    v: Float[Tensor, "batch tokens channels"],
    weight: Float[Tensor, "heads tokens tokens"],
    bias: Float[Tensor, "heads tokens"],
    residual: Float[Tensor, "batch tokens channels"] | None = None,
    gate_act: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, "batch tokens channels"]:
    r"""Gate `u` by a projection of `v` across tokens, `u ⊙ act(W v + b + residual)` (gMLP, eq. 3 and 4).

    Head `h` owns the channels `[h·E/H, (h+1)·E/H)` and has its own `W_h`, `b_h`; `b` is one number a token, shared by
    the channels of its head. The weight multiplies from the left, so no tensor is transposed.

    Args:
        u: what is gated.
        v: the normalised half that the gate is made of; any floating dtype, the dtype of the result.
        weight: `W`, row = token written, column = token read.
        bias: `b`.
        residual: added to the gate before its activation (aMLP's tiny attention, figure 6).
        gate_act: the gate's activation; none in the paper.

    Returns:
        The gated tensor, shaped like `u`. Products accumulate in float32 for 16-bit inputs.
    """
    heads = weight.shape[0]
    if heads == 1:
        gate = torch.matmul(weight[0], v)
        gate = gate.add_(bias[0].unsqueeze(-1))
    else:
        v_BHNP = v.unflatten(-1, (heads, -1)).transpose(1, 2)
        gate_BHNP = torch.matmul(weight, v_BHNP)
        gate_BHNP = gate_BHNP.add_(bias.unsqueeze(-1))
        gate = gate_BHNP.transpose(1, 2).flatten(2)
    if residual is not None:
        gate = gate.add_(residual)
    if gate_act is not None:
        gate = gate_act(gate)
    return u * gate
