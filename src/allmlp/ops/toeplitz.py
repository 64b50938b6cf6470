"""Products with Toeplitz matrices, `W[i, j] = w[i − j]`: gMLP (arXiv 2105.08050), appendix C.

A weight of `n` trained tokens is stored as its 2n − 1 lags `w[−(n−1)], …, w[0], …, w[n−1]` in this order; a token
further away than n − 1 is not read, so that the product is defined at every length.

Shape suffixes: B batch, N tokens, H spatial heads, E channels, P = E / H channels of one head, F frequencies.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from allmlp.ops.spatial_gating import added, spatial_projection

Backend = Literal["auto", "dense", "fft"]

# From this many tokens on the FFT is faster than the dense product on the CPU; benchmarks/toeplitz.py measures it.
FFT_TOKENS = 1024


def toeplitz_product_reference(
    lags: Float[Tensor, "heads lags"], v: Float[Tensor, "batch tokens channels"], *, causal: bool = False
) -> Float[Tensor, "batch tokens channels"]:
    """`toeplitz_product` written straight from its equation, one pair of tokens at a time."""
    reach = (lags.shape[-1] + 1) // 2
    share = v.shape[-1] // lags.shape[0]
    y = torch.zeros_like(v)
    for i in range(v.shape[1]):
        for j in range(v.shape[1]):
            if abs(i - j) < reach and not (causal and j > i):
                y[:, i] += lags[:, i - j + reach - 1].repeat_interleave(share) * v[:, j]
    return y


def toeplitz_matrix(
    lags: Float[Tensor, "heads lags"], tokens: int, *, causal: bool = False
) -> Float[Tensor, "heads tokens tokens"]:
    """The dense matrix `W[i, j] = w[i − j]`, zero where `i − j` is beyond the stored lags (causal: or negative)."""
    reach, dtype = (lags.shape[-1] + 1) // 2, lags.dtype
    if torch.is_grad_enabled() and lags.requires_grad:
        # A lag's gradient is the sum over its diagonal, which torch adds up in the dtype of the lags.
        lags = lags.to(torch.promote_types(dtype, torch.float32))
    if torch.compiler.is_exporting():
        # Windows have a fixed length in an exported graph.
        places = torch.arange(tokens, device=lags.device)
        lag = places.unsqueeze(-1) - places
        inside = (lag < reach) & (lag > (-1 if causal else -reach))
        return (lags[:, lag.clamp(1 - reach, reach - 1) + reach - 1] * inside).to(dtype)
    if causal:
        lags = F.pad(lags[:, reach - 1 :], (reach - 1, 0))
    missing = tokens - reach
    # Row i of W, read from right to left, is the window of length `tokens` that begins at lag i − (tokens − 1).
    window = F.pad(lags, (missing, missing)) if missing else lags
    return window.flip(-1).unfold(-1, tokens, 1).flip(-2).to(dtype)


def toeplitz_product(
    lags: Float[Tensor, "heads lags"],
    v: Float[Tensor, "batch tokens channels"],
    bias: Float[Tensor, "heads 1"] | None = None,
    *,
    causal: bool = False,
    backend: Backend = "auto",
) -> Float[Tensor, "batch tokens channels"]:
    r"""Multiply by Toeplitz matrices across tokens, `y_i = Σ_j w[i − j] v_j + b`, head by head.

    The dense product takes O(N²·E) multiply-adds; the FFT, a linear convolution by zero padding, O(E·N·log N).

    Args:
        lags: `w`, 2n − 1 per head from `w[−(n−1)]` to `w[n−1]`.
        v: any floating dtype; the FFT runs in float32 for 16-bit inputs, the dense product accumulates in float32.
        bias: `b`, one number a head; None for none.
        causal: read tokens `j ≤ i` only. Through the FFT a later token still moves earlier results by rounding.
        backend: `"auto"` takes the FFT from `FFT_TOKENS` tokens on, except for a batch of none and while the model is
            traced for export.

    Returns:
        The product, shaped and typed like `v`.

    Raises:
        ValueError: if `backend` is not one of these.
    """
    tokens = v.shape[1]
    if backend == "auto":
        # No FFT library takes a batch of none.
        dense = torch.compiler.is_exporting() or tokens < FFT_TOKENS or v.shape[0] == 0
        backend = "dense" if dense else "fft"
    if backend == "dense":
        bias = lags.new_zeros(lags.shape[0], 1) if bias is None else bias
        return spatial_projection(v, toeplitz_matrix(lags, tokens), bias, causal=causal)
    if backend == "fft":
        # Autocast knows nothing of placeholders without numbers, and does nothing to them.
        with torch.autocast("cpu" if v.is_meta else v.device.type, enabled=False):
            y = _fft_product(lags, v, causal)
            return y if bias is None else added(y, bias.repeat_interleave(v.shape[-1] // lags.shape[0]))
    raise ValueError(f"backend must be 'auto', 'dense' or 'fft', got {backend!r}")


def _fft_product(lags: Tensor, v: Tensor, causal: bool) -> Tensor:
    dtype = torch.promote_types(v.dtype, torch.float32)
    tokens, reach = v.shape[1], (lags.shape[-1] + 1) // 2
    used = min(reach, tokens)
    # The wrap-around of a circular convolution this long falls outside the first `tokens` results.
    length = _fast_length(tokens + used - 1)
    kernel = F.pad(lags[:, reach - 1 : reach - 1 + used], (0, length - used))
    if not causal:
        # A negative lag sits at the end of the circle.
        kernel = kernel + F.pad(lags[:, reach - used : reach - 1], (length - used + 1, 0))
    kernel_HF = torch.fft.rfft(kernel.to(dtype))
    v_BHPN = v.to(dtype).unflatten(-1, (lags.shape[0], -1)).permute(0, 2, 3, 1)
    y_BHPN = torch.fft.irfft(torch.fft.rfft(v_BHPN, n=length) * kernel_HF.unsqueeze(1), n=length)[..., :tokens]
    return y_BHPN.permute(0, 3, 1, 2).flatten(2).to(v.dtype)


def _fast_length(least: int) -> int:
    """The smallest `m · 2^k ≥ least` with m of 2, 3, 5: lengths that FFT libraries have short codelets for."""
    return min(m << max(0, ((least + m - 1) // m - 1).bit_length()) for m in (2, 3, 5))
