"""The weighted sum of split attention (ViP, arXiv 2106.12368, and S²-MLPv2, arXiv 2108.01072, eq. 3 to 5)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def split_attention_reference(
    branches: Sequence[Float[Tensor, "batch height width channels"]],
    logits: Float[Tensor, "batch branches channels"],
) -> Float[Tensor, "batch height width channels"]:
    """`split_attention` as one contraction over the stacked branches."""
    return torch.einsum("kbhwc,bkc->bhwc", torch.stack(tuple(branches)), logits.softmax(dim=1))


def split_attention(
    branches: Sequence[Float[Tensor, "batch height width channels"]],
    logits: Float[Tensor, "batch branches channels"],
) -> Float[Tensor, "batch height width channels"]:
    """Add branches up with weights that sum to one across the branches, channel by channel.

    `y[b, h, w, c] = Σ_k softmax_k(logits[b, :, c])[k] · branches[k][b, h, w, c]`.

    Args:
        branches: tensors of one shape and dtype; never stacked, so nothing is copied.
        logits: one number for each sample, branch and channel.
    """
    weights = logits.softmax(dim=1)[:, :, None, None, :].unbind(dim=1)
    out = branches[0] * weights[0]
    for branch, weight in zip(branches[1:], weights[1:], strict=True):
        out = torch.addcmul(out, branch, weight)
    return out
