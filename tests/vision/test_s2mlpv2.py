import pytest
import torch

from allmlp.layers import PatchDownsampling, SplitAttention
from allmlp.vision import S2MLPv2
from allmlp.vision.s2mlpv2 import S2Attention, S2MLPv2Block
from tests.layers.parity import assert_matches, channel_mlp, layer_norm, linear
from tests.ops.test_spatial_shift import loop


def test_block_matches_reference() -> None:
    def attention(p, x):
        x1, x2, x3 = linear(p, "attn.expand", x).split(x.shape[-1], -1)
        maps = (loop(x1, "height_first"), loop(x2, "width_first"), x3)
        pooled = sum(branch.mean((1, 2)) for branch in maps)
        shares = channel_mlp(p, "attn.split_attention", pooled).reshape(len(x), 3, -1).softmax(1)
        return linear(p, "attn.proj", sum(shares[:, k, None, None] * branch for k, branch in enumerate(maps)))

    def block(p, x):
        x = x + attention(p, layer_norm(p, "norm1", x, 1e-5))
        return x + channel_mlp(p, "mlp_channels", layer_norm(p, "norm2", x, 1e-5))

    assert_matches(S2MLPv2Block(8, mlp_ratio=2), block, torch.randn(2, 3, 5, 8))


def test_stages() -> None:
    model = S2MLPv2(depths=(1, 2, 1), embed_dims=(8, 16, 32), num_classes=3)
    assert [isinstance(block, PatchDownsampling) for block in model.blocks] == [False, True, False, False, True, False]
    assert [(info["num_chs"], info["reduction"]) for info in model.feature_info] == [
        (8, 7),
        (16, 14),
        (16, 14),
        (32, 28),
    ]
    # 30 pixels: 5 patches of 7, padded; 3 and 2 behind the downsamplings.
    assert [y.shape[2:] for y in model.forward_intermediates(torch.randn(1, 3, 30, 30), intermediates_only=True)] == [
        (5, 5),
        (3, 3),
        (3, 3),
        (2, 2),
    ]


def test_stages_must_agree() -> None:
    with pytest.raises(ValueError, match=r"as many stages, got \(1, 2\) and \(8,\)"):
        S2MLPv2(depths=(1, 2), embed_dims=(8,))


class Sum(SplitAttention):
    """In the place of split attention."""

    def forward(self, branches):
        return sum(branches)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_what_stands_in_the_place_of_split_attention_is_called(mode: bool) -> None:
    layer, x = S2Attention(8).train(mode), torch.randn(2, 3, 3, 8)
    layer.split_attention = Sum(8, 3)
    x1, x2, x3 = layer.expand(x).chunk(3, -1)
    torch.testing.assert_close(layer(x), layer.proj(layer.shift1(x1) + layer.shift2(x2) + x3))


def test_gradients_that_are_differentiated_are_the_same() -> None:
    """The logits depend on the branches: that way is not counted twice."""
    layer, x = S2Attention(8).double(), torch.randn(2, 3, 3, 8, dtype=torch.float64)
    parameters = list(layer.parameters())
    plain = torch.autograd.grad(layer(x).square().sum(), parameters)
    graph = torch.autograd.grad(layer(x).square().sum(), parameters, create_graph=True)
    torch.testing.assert_close(graph, plain)
