import torch
from torch import nn

from allmlp.layers import SampleNorm
from tests.layers.parity import assert_matches, normalise


def test_matches_reference() -> None:
    def reference(p, x):
        return normalise(x, (1, 2, 3), 1e-5) * p["weight"] + p["bias"]

    assert_matches(SampleNorm(6), reference, torch.randn(3, 5, 4, 6) + 2)
    assert_matches(SampleNorm(6), reference, torch.randn(2, 1, 1, 6))


def test_is_a_group_norm_of_one_group() -> None:
    """So that AS-MLP's checkpoints fit: same parameters, the same function of the channels-first map."""
    ours, theirs = SampleNorm(8), nn.GroupNorm(1, 8)
    nn.init.normal_(theirs.weight)
    nn.init.normal_(theirs.bias)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 8, 3, 5)
    torch.testing.assert_close(ours(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), theirs(x))


def test_keeps_channels_last_contiguous() -> None:
    assert SampleNorm(8)(torch.randn(2, 3, 5, 8)).is_contiguous()
