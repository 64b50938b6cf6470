"""The linear map across tokens of MLP-Mixer (arXiv 2105.01601), ResMLP (2105.03404) and gMLP (2105.08050).

Shape suffixes: B batch, M tokens written, N tokens read, C channels.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


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
        return F.linear(x.transpose(1, 2), weight).transpose(1, 2) + bias.unsqueeze(-1)
    return torch.baddbmm(bias.unsqueeze(-1), weight.expand(x.shape[0], -1, -1), x)
