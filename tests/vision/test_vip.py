import pytest
import timm
import torch

from allmlp.layers import PatchDownsampling, PermuteMLP, WeightedPermuteMLP
from allmlp.vision import VisionPermutator
from allmlp.vision.vip import PermutatorBlock
from tests.layers.parity import assert_matches, channel_mlp, layer_norm, linear, under
from tests.layers.test_permute_mlp import branches, weighted


@pytest.mark.parametrize("mixing", ["weighted", "sum"])
def test_block_matches_reference(mixing) -> None:
    def mix(p, x):
        return weighted(p, x, 4) if mixing == "weighted" else linear(p, "proj", sum(branches(p, x, 4)))

    def block(p, x):
        x = x + mix(under(p, "attn"), layer_norm(p, "norm1", x, 1e-5))
        return x + channel_mlp(p, "mlp", layer_norm(p, "norm2", x, 1e-5))

    assert_matches(PermutatorBlock(8, (4, 3), 4, mixing=mixing, mlp_ratio=2), block, torch.randn(2, 4, 3, 8))


@pytest.mark.parametrize(
    ("name", "depth", "downsampling", "grids"),
    [
        ("vip_small_patch14_224", 18, None, (16, 16)),
        ("vip_small_patch7_224", 18, 4, (32, 16)),
        ("vip_medium_patch7_224", 24, 7, (32, 16)),
        ("vip_large_patch7_224", 36, 8, (32, 16)),
    ],
)
def test_published_models(name, depth, downsampling, grids) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    blocks = [block for block in model.blocks if isinstance(block, PermutatorBlock)]
    assert len(blocks) == depth
    assert [i for i, block in enumerate(model.blocks) if isinstance(block, PatchDownsampling)] == (
        [] if downsampling is None else [downsampling]
    )
    assert (blocks[0].attn.grid_size[0], blocks[-1].attn.grid_size[0]) == grids
    for block in blocks:
        # Mixing along an axis takes as many numbers as there are channels: segments = height = width.
        channels = block.norm1.normalized_shape[0]
        assert block.attn.grid_size == (block.attn.segments,) * 2
        assert block.attn.mlp_h.weight.shape == block.attn.mlp_w.weight.shape == (channels, channels)


def test_mixing_chooses_the_layer() -> None:
    small = {"img_size": 28, "depths": (1,), "embed_dims": (8,), "segments": (4,), "downsample_after": ()}
    assert type(VisionPermutator(**small).blocks[0].attn) is WeightedPermuteMLP
    assert type(VisionPermutator(**small, mixing="sum").blocks[0].attn) is PermuteMLP
    with pytest.raises(ValueError, match="mixing must be one of weighted, sum, got 'mean'"):
        VisionPermutator(**small, mixing="mean")


def test_stages_must_agree() -> None:
    with pytest.raises(ValueError, match="must name as many stages"):
        VisionPermutator(depths=(1, 1), embed_dims=(8,), segments=(4, 4))
    with pytest.raises(ValueError, match="stage 2 changes the width without a downsampling in front"):
        VisionPermutator(depths=(1, 1), embed_dims=(8, 16), segments=(4, 4), downsample_after=())


@pytest.mark.usefixtures("unchecked")
def test_compiled_blocks_give_what_plain_ones_give() -> None:
    torch.manual_seed(0)
    blocks = timm.create_model("vip_small_patch7_224").eval().to(torch.bfloat16).blocks[:5]
    x = torch.randn(2, 32, 32, 192).bfloat16()
    with torch.no_grad():
        # Laid out for the permuted branches, the sums came out with NaN on processors with AVX-512.
        torch.testing.assert_close(torch.compile(lambda x: blocks(x))(x), blocks(x), rtol=0, atol=0.06)


@pytest.mark.parametrize("stage", [0, 2, 9])
def test_what_no_stage_follows_is_not_downsampled(stage: int) -> None:
    with pytest.raises(ValueError, match=f"must name stages that another follows, got {stage} of 2"):
        VisionPermutator(depths=(1, 1), embed_dims=(8, 8), segments=(4, 4), downsample_after=(stage,))
