"""A linear map across tokens: MLP-Mixer (arXiv 2105.01601) and ResMLP (arXiv 2105.03404)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from allmlp.ops import token_linear


class TokenLinear(nn.Module):
    """`Y = W X + b`: a linear map across tokens, the same for every channel.

    Args:
        in_tokens: tokens read.
        out_tokens: tokens written.
    """

    def __init__(self, in_tokens: int, out_tokens: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_tokens, in_tokens))
        self.bias = nn.Parameter(torch.empty(out_tokens))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Glorot-uniform weight, zero bias."""
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Float[Tensor, "batch in_tokens channels"]) -> Float[Tensor, "batch out_tokens channels"]:
        if x.shape[1] != self.weight.shape[1]:
            raise ValueError(f"the input has {x.shape[1]} tokens, this layer mixes exactly {self.weight.shape[1]}")
        return token_linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}"
