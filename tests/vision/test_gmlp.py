import pytest
import timm
import torch
from torch import Tensor

from allmlp.vision import GMLP
from allmlp.vision.gmlp import GMLPBlock
from tests.layers.parity import assert_matches, gelu, layer_norm, linear


def block(p, x: Tensor, heads: int = 1, attention_size: int = 0) -> Tensor:
    """The block from the paper's figure 1, tokens one by one; with tiny attention, figure 6."""
    tokens = x.flatten(1, 2)
    normed = layer_norm(p, "norm", tokens, 1e-6)
    u, v = gelu(linear(p, "proj_in", normed)).chunk(2, -1)
    v = layer_norm(p, "sgu.norm", v, 1e-5)
    width = v.shape[-1] // heads
    gate = torch.zeros_like(v)
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        for i in range(tokens.shape[1]):
            gate[:, i, own] = p["sgu.bias"][head, i] + sum(
                p["sgu.weight"][head, i, j] * v[:, j, own] for j in range(tokens.shape[1])
            )
    if attention_size:
        q, k, values = linear(p, "sgu.attention.qkv", normed).split(attention_size, -1)
        shares = (q @ k.transpose(1, 2) * attention_size**-0.5).softmax(-1)
        gate = gate + linear(p, "sgu.attention.proj", shares @ values)
    return x + linear(p, "proj_out", u * gate).reshape(x.shape)


@pytest.mark.parametrize(("heads", "attention_size"), [(1, 0), (2, 0), (1, 5), (4, 3)])
def test_block_matches_reference(heads, attention_size) -> None:
    assert_matches(
        GMLPBlock(6, 12, 16, heads=heads, attention_size=attention_size),
        lambda p, x: block(p, x, heads, attention_size),
        torch.randn(2, 3, 4, 6),
    )


def cross_token_share(layer: GMLPBlock, x: Tensor) -> float:
    """The largest derivative of a token's output by another token, over the largest by itself beyond the residual."""
    jacobian = torch.autograd.functional.jacobian(layer, x).squeeze().flatten(0, 1).flatten(2, 3)
    tokens = x.shape[1] * x.shape[2]
    jacobian = jacobian - torch.eye(tokens * x.shape[3], dtype=x.dtype).view_as(jacobian)
    own = torch.eye(tokens, dtype=torch.bool)
    by_token = jacobian.view(tokens, x.shape[3], tokens, x.shape[3]).abs().amax((1, 3))
    return (by_token[~own].max() / by_token[own].max()).item()


def test_a_new_block_lets_no_token_see_another() -> None:
    """W near zero and b at one: the block behaves as a feed-forward network (paper, section 2.1)."""
    layer = GMLPBlock(8, 16, 48).double()
    x = torch.randn(1, 4, 4, 8, dtype=torch.float64)
    assert 0 < cross_token_share(layer, x) < 1e-3
    # Without the near-zero rest it is a feed-forward network, exactly: tokens apart, the gate one.
    with torch.no_grad():
        layer.sgu.weight.zero_()
    assert cross_token_share(layer, x) == 0
    u, _ = gelu(layer.proj_in(layer.norm(x))).chunk(2, -1)
    torch.testing.assert_close(layer(x), x + layer.proj_out(u))


def test_a_trained_block_does() -> None:
    layer = GMLPBlock(8, 16, 48).double()
    with torch.no_grad():
        layer.sgu.weight.normal_()
    assert cross_token_share(layer, torch.randn(1, 4, 4, 8, dtype=torch.float64)) > 0.1


def test_width_is_counted_before_the_split() -> None:
    model = timm.create_model("gmlp_tiny_patch16_224")
    assert model.blocks[0].proj_in.weight.shape == (768, 128)
    assert model.blocks[0].proj_out.weight.shape == (128, 384)


def test_tiny_attention_comes_with_amlp() -> None:
    with torch.device("meta"):
        model = timm.create_model("amlp_small_patch16_224")
    attention = model.blocks[-1].sgu.attention
    assert attention.qkv.weight.shape == (192, 256)
    assert attention.qkv.bias is None
    assert attention.proj.weight.shape == (768, 64)


def test_without_the_final_norm() -> None:
    model = GMLP(img_size=16, num_blocks=2, embed_dim=8, patch_size=4, num_classes=0, final_norm=False)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model(x), model.blocks(model.stem(x)).mean((1, 2)))


def test_survival_follows_the_paper() -> None:
    """Linearly to the last block's 1.00, 0.95 and 0.80 (appendix A)."""
    for name, survival in (("tiny", 1.0), ("small", 0.95), ("base", 0.8)):
        with torch.device("meta"):
            blocks = timm.create_model(f"gmlp_{name}_patch16_224").blocks
        assert blocks[0].drop_path.drop_prob == 0
        assert 1 - blocks[-1].drop_path.drop_prob == pytest.approx(survival)


def test_dropout_stands_inside_a_block_too() -> None:
    block, x = GMLPBlock(8, 4, 16, drop=0.5).train(), torch.randn(2, 2, 2, 8)
    block.drop2.p = 0.0
    assert not torch.equal(block(x), block(x))
