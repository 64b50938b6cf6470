import pytest
import torch
from torch import Tensor, nn

from allmlp.layers import SplitAttention
from tests.layers.parity import assert_matches, channel_mlp


class _OneInput(nn.Module):
    """Split attention on one stacked input."""

    def __init__(self, layer: SplitAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.unbind(0))


def reference(branches, layout):
    def weigh(p, x):
        channels = x.shape[-1]
        pooled = sum(branch.flatten(1, 2).mean(1) for branch in x)
        logits = channel_mlp(p, "layer", pooled)
        out = torch.zeros_like(x[0])
        for c in range(channels):
            # Channel-major: all branches of channel 0, then of channel 1; branch-major: all channels of branch 0 first.
            places = [c * branches + k if layout == "channel_major" else k * channels + c for k in range(branches)]
            shares = logits[:, places].exp()
            shares = shares / shares.sum(1, keepdim=True)
            out[..., c] = sum(shares[:, k, None, None] * x[k][..., c] for k in range(branches))
        return out

    return weigh


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", ["channel_major", "branch_major"])
@pytest.mark.parametrize("branches", [1, 2, 3])
def test_matches_reference(branches, layout, bias) -> None:
    layer = SplitAttention(8, branches, bias=bias, layout=layout)
    assert_matches(_OneInput(layer), reference(branches, layout), torch.randn(branches, 2, 3, 5, 8))


def test_hidden_width_is_a_quarter() -> None:
    """The published 25M and 55M need it; ports that use the full width come to 31.7M and 70.0M."""
    layer = SplitAttention(32, 3)
    assert layer.fc1.weight.shape == (8, 32)
    assert layer.fc2.weight.shape == (96, 8)


def test_does_not_depend_on_the_resolution() -> None:
    layer = SplitAttention(8, 3)
    maps = [torch.randn(1, 4, 4, 8) for _ in range(3)]
    larger = [x.repeat_interleave(2, 1).repeat_interleave(2, 2) for x in maps]
    expected = layer(maps).repeat_interleave(2, 1).repeat_interleave(2, 2)
    torch.testing.assert_close(layer(larger), expected)


def test_unknown_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="layout must be channel_major or branch_major, got 'rows'"):
        SplitAttention(8, layout="rows")


def test_other_numbers_of_branches_are_refused() -> None:
    with pytest.raises(ValueError, match="needs at least 4 channels and one branch, got 3 and 3"):
        SplitAttention(3, 3)
    with pytest.raises(ValueError, match="made for 3 branches, got 2"):
        SplitAttention(8, 3)([torch.randn(1, 2, 2, 8)] * 2)
