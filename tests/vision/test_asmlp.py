import pytest
import torch

from allmlp.layers import PatchMerging
from allmlp.vision import ASMLP
from allmlp.vision.asmlp import ASMLPBlock
from tests.layers.parity import assert_matches, channel_mlp, sample_norm, under
from tests.layers.test_axial_shift import reference as axial_shift


def test_block_matches_reference() -> None:
    def block(p, x):
        x = x + axial_shift(3)(under(p, "axial_shift"), sample_norm(p, "norm1", x))
        return x + channel_mlp(p, "mlp", sample_norm(p, "norm2", x))

    assert_matches(ASMLPBlock(7, shift_size=3, mlp_ratio=2), block, torch.randn(2, 3, 4, 7))


def test_stages() -> None:
    model = ASMLP(depths=(1, 1, 2), embed_dim=8, num_classes=3)
    assert [isinstance(block, PatchMerging) for block in model.blocks] == [False, True, False, True, False, False]
    assert [(info["num_chs"], info["reduction"]) for info in model.feature_info] == [(8, 4), (16, 8), (32, 16)]
    # 22 pixels: 6 patches of 4, padded; 3 and 2 behind the mergings.
    maps = model.forward_intermediates(torch.randn(1, 3, 22, 22), intermediates_only=True)
    assert [y.shape[2:] for y in maps] == [(6, 6), (3, 3), (2, 2)]


def test_shift_size_reaches_every_block() -> None:
    model = ASMLP(depths=(1, 1), embed_dim=8, shift_size=7)
    assert [block.axial_shift.shift_size for block in (model.blocks[0], model.blocks[2])] == [7, 7]
    with pytest.raises(ValueError, match="shift_size must be odd and positive, got 6"):
        ASMLP(shift_size=6)
