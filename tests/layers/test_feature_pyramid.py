import pytest
import torch
from torch import Tensor, nn

from allmlp.layers import SimpleFeaturePyramid
from tests.layers.parity import Parameters, assert_matches, gelu, normalise, under


class Joined(SimpleFeaturePyramid):
    """Every level in one tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([level.flatten() for level in super().forward(x)])


def norm(p: Parameters, x: Tensor) -> Tensor:
    return p["weight"][:, None, None] * normalise(x, (1,), 1e-6) + p["bias"][:, None, None]


def doubled(p: Parameters, x: Tensor) -> Tensor:
    """Each position becomes 2×2 positions."""
    batch, _, height, width = x.shape
    y = torch.einsum("bkij,koyx->boiyjx", x, p["weight"]).reshape(batch, -1, 2 * height, 2 * width)
    return y + p["bias"][:, None, None]


def halved(x: Tensor) -> Tensor:
    """The largest of each 2×2 positions, fewer at the border."""
    rows = [
        torch.stack([x[:, :, i : i + 2, j : j + 2].amax((2, 3)) for j in range(0, x.shape[3], 2)], -1)
        for i in range(0, x.shape[2], 2)
    ]
    return torch.stack(rows, 2)


def projected(p: Parameters, x: Tensor, first: int) -> Tensor:
    """1×1 and 3×3 convolution, each with its norm; they lie in the level from place `first` on."""
    x = norm(under(p, f"{first + 1}"), torch.einsum("bkij,ok->boij", x, p[f"{first}.weight"][:, :, 0, 0]))
    height, width = x.shape[2:]
    padded = nn.functional.pad(x, (1, 1, 1, 1))
    y = sum(
        torch.einsum("bkij,ok->boij", padded[:, :, i : i + height, j : j + width], p[f"{first + 2}.weight"][:, :, i, j])
        for i in range(3)
        for j in range(3)
    )
    return norm(under(p, f"{first + 3}"), y)


def test_levels_match_reference() -> None:
    def pyramid(p: Parameters, x: Tensor) -> Tensor:
        finest, fine, same, coarse, coarsest = (under(p, f"levels.{level}") for level in range(5))
        halfway = gelu(norm(under(finest, "1"), doubled(under(finest, "0"), x)))
        levels = [
            projected(finest, doubled(under(finest, "3"), halfway), 4),
            projected(fine, doubled(under(fine, "0"), x), 1),
            projected(same, x, 0),
            projected(coarse, halved(x), 1),
            projected(coarsest, halved(halved(x)), 2),
        ]
        return torch.cat([level.flatten() for level in levels])

    assert_matches(Joined(9, 5, scales=(4, 2, 1, 0.5, 0.25)), pyramid, torch.randn(2, 9, 5, 3))


def test_the_papers_pyramid() -> None:
    levels = SimpleFeaturePyramid(8)(torch.randn(1, 8, 4, 6))
    assert [tuple(level.shape) for level in levels] == [
        (1, 256, 16, 24),
        (1, 256, 8, 12),
        (1, 256, 4, 6),
        (1, 256, 2, 3),
    ]


@pytest.mark.parametrize("scale", [3, 0.75, 0, -2])
def test_scales_are_powers_of_two(scale) -> None:
    with pytest.raises(ValueError, match=f"scales of a feature pyramid are powers of two, got {scale}"):
        SimpleFeaturePyramid(8, scales=(1, scale))


def test_channels_can_be_halved() -> None:
    assert SimpleFeaturePyramid(4, 3, scales=(4,))(torch.randn(1, 4, 1, 1))[0].shape == (1, 3, 4, 4)
    with pytest.raises(ValueError, match="a level of scale 8 needs at least 8 channels, the map has 4"):
        SimpleFeaturePyramid(4, 3, scales=(8,))
