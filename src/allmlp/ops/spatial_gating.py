"""The spatial gating unit's product: gMLP (arXiv 2105.08050), section 2.1.

Shape suffixes: B batch, M tokens written, N tokens read, H spatial heads, E gate channels, P = E / H of one head.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from allmlp.ops.backends import Backend, takes_fused
from allmlp.ops.execution import autocast, is_transformed
from allmlp.ops.products import multiply
from allmlp.ops.recomputing import Across, recomputing_linear
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
    return apply_gate(u, finished_gate(spatial_projection(v, weight, bias), residual, gate_act))


def spatial_projection(
    v: Float[Tensor, "batch read channels"],
    weight: Float[Tensor, "*rows heads written read"],
    bias: Float[Tensor, "*#rows heads #written"],
    *,
    causal: bool = False,
) -> Float[Tensor, "batch written channels"]:
    """`W v + b` of `spatial_gating`, a fresh tensor; causal, of what `W` holds up to its diagonal."""
    heads = weight.shape[-3]
    if weight.dim() == 3 and bias.dim() == 2 and (heads == 1 or _gains_head_by_head(v, weight, causal)):
        parts = [
            token_linear(v_BNP, w_MN, b_M, causal=causal)
            for v_BNP, w_MN, b_M in zip(v.chunk(heads, dim=-1), weight, bias, strict=True)
        ]
        return parts[0] if heads == 1 else torch.cat(parts, dim=-1)
    weight = weight.tril() if causal else weight
    if heads == 1:
        gate = multiply(torch.matmul, weight.squeeze(-3), v)
        return added(gate, bias.squeeze(-2).unsqueeze(-1))
    v_BHNP = v.unflatten(-1, (heads, -1)).transpose(1, 2)
    gate_BHMP = multiply(torch.matmul, weight, v_BHNP)
    gate_BHMP = added(gate_BHMP, bias.unsqueeze(-1))
    return gate_BHMP.transpose(1, 2).flatten(2)


def _gains_head_by_head(v: Tensor, weight: Tensor, causal: bool) -> bool:
    """Whether a product for each head takes less time than one for all, which copies `W` once a sample and `v` once."""
    return weight.shape[-2] >= _MANY_TOKENS and (causal or v.shape[0] > 1) and not torch.compiler.is_exporting()


def finished_gate(
    gate: Float[Tensor, "batch tokens channels"],
    residual: Float[Tensor, "batch tokens channels"] | None = None,
    gate_act: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, "batch tokens channels"]:
    """`act(gate + residual)`. The gate is taken over: it must be a fresh tensor that nobody else reads."""
    if residual is not None:
        gate = added(gate, residual)
    return gate if gate_act is None else gate_act(gate)


def apply_gate(
    u: Float[Tensor, "batch tokens channels"], gate: Float[Tensor, "batch tokens channels"]
) -> Float[Tensor, "batch tokens channels"]:
    """`u ⊙ gate`. The gate is taken over: it must be a fresh tensor that nobody else reads."""
    if torch.is_grad_enabled() or torch.jit.is_tracing() or is_transformed() or gate.dtype != u.dtype:
        return u * gate
    # Nothing is kept for backward: the gate's memory serves for the result.
    return gate.mul_(u)


def added(gate: Tensor, x: Tensor) -> Tensor:
    """`gate + x` in the gate's dtype, where the gate lies.

    Under vmap `x` alone may have the mapped axis, which has no place there.
    """
    return (gate + x).to(gate.dtype) if is_transformed() else gate.add_(x)


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
    return apply_gate(u, normalized_projection(v, norm_weight, norm_bias, norm_eps, weight, bias, causal=causal))


def normalized_projection(
    v: Float[Tensor, "batch read channels"],
    norm_weight: Float[Tensor, " channels"],
    norm_bias: Float[Tensor, " channels"],
    norm_eps: float,
    weight: Float[Tensor, "heads written read"],
    bias: Float[Tensor, " heads #written"],
    *,
    causal: bool = False,
) -> Float[Tensor, "batch written channels"]:
    """`W·LN(v) + b` of `normalized_spatial_gating`, a fresh tensor. With one head, backward keeps `v`, not its norm."""
    norm = partial(_layer_norm, norm_eps)
    if weight.shape[0] == 1:
        across: Across = "earlier tokens" if causal else "tokens"
        return recomputing_linear(across, norm, (v, norm_weight, norm_bias), weight.squeeze(0), bias.squeeze(0))
    return spatial_projection(norm(v, norm_weight, norm_bias), weight, bias, causal=causal)


def _layer_norm(eps: float, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(x, scale.shape, scale, shift, eps)


# From this many tokens on a call for each head costs less than the copies.
_MANY_TOKENS = 128
