import pytest
import timm
import torch

from allmlp.layers import Affine
from allmlp.vision.resmlp import ResMLPBlock
from tests.layers.parity import assert_matches, channel_mlp
from tests.layers.test_token_mixing import mix


def test_block_matches_reference() -> None:
    def affine(p, name, x):
        return p[f"{name}.alpha"] * x + p[f"{name}.beta"]

    def block(p, x):
        tokens = x.flatten(1, 2)
        tokens = tokens + p["ls1"] * mix(p, "linear_tokens.", affine(p, "norm1", tokens))
        tokens = tokens + p["ls2"] * channel_mlp(p, "mlp_channels", affine(p, "norm2", tokens))
        return tokens.reshape(x.shape)

    assert_matches(ResMLPBlock(5, 12, mlp_ratio=2), block, torch.randn(2, 3, 4, 5))


@pytest.mark.parametrize(("depth", "scale"), [(12, 0.1), (24, 1e-5), (36, 1e-6)])
def test_layer_scale_starts_by_depth(depth, scale) -> None:
    model = timm.create_model(f"resmlp_{depth}_patch16_224")
    for block in model.blocks:
        assert (block.ls1 == scale).all()
        assert (block.ls2 == scale).all()


def test_there_is_no_normalisation() -> None:
    with torch.device("meta"):
        model = timm.create_model("resmlp_12_patch16_224")
    assert not [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert isinstance(model.norm, Affine)
