"""Maps at several strides from one map: Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection"
(arXiv 2203.16527, section 3)."""

import math
from collections.abc import Sequence

from jaxtyping import Float
from timm.layers import LayerNorm2d
from torch import Tensor, nn


class SimpleFeaturePyramid(nn.Module):
    """ViTDet's simple feature pyramid: each level is made from the same map, without connections between levels.

    A level of scale 2^k comes from k transposed convolutions (2×2, stride 2) that halve the channels, with a LayerNorm
    and a GELU between two of them; one of scale 2^-k from k max-poolings (2×2, stride 2, odd sizes rounded up). Then a
    1×1 convolution to `out_channels` and a 3×3 convolution follow, each with a LayerNorm.

    Args:
        channels: width of the map.
        out_channels: width of every level.
        scales: size of each level over that of the map, powers of two.

    Raises:
        ValueError: for a scale that is no power of two, or larger than `channels`.
    """

    def __init__(self, channels: int, out_channels: int = 256, scales: Sequence[float] = (4.0, 2.0, 1.0, 0.5)) -> None:
        super().__init__()
        self.scales = tuple(scales)
        self.levels = nn.ModuleList(_level(channels, out_channels, scale) for scale in scales)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> list[Float[Tensor, "batch out_channels _ _"]]:
        return [level(x) for level in self.levels]

    def extra_repr(self) -> str:
        return f"scales={self.scales}"


def _level(channels: int, out_channels: int, scale: float) -> nn.Sequential:
    """One level: resampling, then the two convolutions with their norms."""
    octaves = math.log2(scale) if scale > 0 else math.nan
    if not octaves.is_integer():
        raise ValueError(f"scales of a feature pyramid are powers of two, got {scale}")
    if scale > channels:
        raise ValueError(f"a level of scale {scale:g} needs at least {scale:g} channels, the map has {channels}")
    layers: list[nn.Module] = []
    for step in range(int(octaves)):
        if step:
            layers += [LayerNorm2d(channels), nn.GELU()]
        layers.append(nn.ConvTranspose2d(channels, channels // 2, kernel_size=2, stride=2))
        channels //= 2
    for _ in range(-int(octaves)):
        layers.append(nn.MaxPool2d(kernel_size=2, stride=2, ceil_mode=True))
    return nn.Sequential(
        *layers,
        nn.Conv2d(channels, out_channels, kernel_size=1, bias=False),
        LayerNorm2d(out_channels),
        nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False),
        LayerNorm2d(out_channels),
    )
