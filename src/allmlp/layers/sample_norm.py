"""Group normalisation with one group, on channels-last maps."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class SampleNorm(nn.GroupNorm):
    """AS-MLP's norm: `GroupNorm(1, C)`, each sample normalised over its positions and channels together.

    `y = (x − mean) / √(var + eps) ⊙ weight + bias` with mean and variance over `height, width, channels`.

    Args:
        channels: size of the last dimension.
        eps: added to the variance.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__(1, channels, eps=eps)

    def forward(self, x: Float[Tensor, "batch height width channels"]) -> Float[Tensor, "batch height width channels"]:
        return sample_norm(x, self.weight, self.bias, self.eps)


def sample_norm(
    x: Float[Tensor, "batch height width channels"],
    weight: Float[Tensor, " channels"],
    bias: Float[Tensor, " channels"],
    eps: float,
) -> Float[Tensor, "batch height width channels"]:
    """`SampleNorm` as a function."""
    # The permuted view has torch's channels-last memory format, which group_norm keeps: nothing is copied.
    return F.group_norm(x.permute(0, 3, 1, 2), 1, weight, bias, eps).permute(0, 2, 3, 1)
