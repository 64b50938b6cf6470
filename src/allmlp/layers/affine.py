"""ResMLP's normalisation-free rescaling (arXiv 2105.03404, section 2)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from allmlp.ops import scaled_add


class Affine(nn.Module):
    """`y = alpha ⊙ x + beta`, one factor and one offset a channel, starting as the identity.

    Args:
        channels: size of the last dimension.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def reset_parameters(self) -> None:
        """The identity."""
        nn.init.ones_(self.alpha)
        nn.init.zeros_(self.beta)

    def forward(self, x: Float[Tensor, "*batch channels"]) -> Float[Tensor, "*batch channels"]:
        return scaled_add(self.beta, self.alpha, x)
