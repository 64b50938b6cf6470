"""Token mixing by a product with the tokens' dimension: MLP-Mixer (arXiv 2105.01601) and ResMLP (arXiv 2105.03404).

The weight multiplies from the left, so tokens are mixed without transposing the activations.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn


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
        return torch.matmul(self.weight, x).add_(self.bias.unsqueeze(-1))

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}"


class TokenMixingMLP(nn.Module):
    """Mixer's token mixing, `W2 GELU(W1 X + b1) + b2` across tokens (MLP-Mixer, eq. 1).

    Args:
        tokens: number of tokens.
        hidden: width of the hidden layer, the paper's D_S.
        drop: dropout rate after each layer.
        act_layer: makes the activation.
    """

    def __init__(
        self, tokens: int, hidden: int, drop: float = 0.0, act_layer: Callable[[], nn.Module] = nn.GELU
    ) -> None:
        super().__init__()
        self.fc1 = TokenLinear(tokens, hidden)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = TokenLinear(hidden, tokens)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Float[Tensor, "batch tokens channels"]) -> Float[Tensor, "batch tokens channels"]:
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))
