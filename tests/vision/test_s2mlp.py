from functools import partial

import pytest
import timm
import torch
from torch import nn

from allmlp.layers import Affine
from allmlp.vision import S2MLP
from allmlp.vision.s2mlp import S2MLPBlock
from tests.layers.parity import assert_matches, channel_mlp, gelu, layer_norm, linear
from tests.ops.test_spatial_shift import loop


@pytest.mark.parametrize("norm", ["layer", "affine"])
def test_block_matches_reference(norm) -> None:
    def norm_(p, name, x):
        return layer_norm(p, name, x, 1e-6) if norm == "layer" else p[f"{name}.alpha"] * x + p[f"{name}.beta"]

    def block(p, x):
        x = x + norm_(p, "norm1", linear(p, "fc2", loop(gelu(linear(p, "fc1", x)), "width_first")))
        return x + norm_(p, "norm2", channel_mlp(p, "mlp_channels", x))

    norm_layer = partial(nn.LayerNorm, eps=1e-6) if norm == "layer" else partial(Affine)
    assert_matches(S2MLPBlock(6, mlp_ratio=2, norm_layer=norm_layer), block, torch.randn(2, 3, 4, 6))


def test_norms_of_the_published_models() -> None:
    with torch.device("meta"):
        wide, deep = (timm.create_model(f"s2mlp_{size}_patch16_224") for size in ("wide", "deep"))
    assert {type(module) for module in wide.modules() if isinstance(module, nn.LayerNorm | Affine)} == {nn.LayerNorm}
    assert {type(module) for module in deep.modules() if isinstance(module, nn.LayerNorm | Affine)} == {Affine}
    assert isinstance(wide.stem.norm, nn.LayerNorm)


def test_unknown_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="norm must be one of layer, affine, got 'batch'"):
        S2MLP(norm="batch")


@pytest.mark.parametrize("watched", ["shift", "fc2"])
def test_hooks_see_what_operators_could_take_over(watched) -> None:
    layer, x = S2MLPBlock(6, mlp_ratio=2, norm_layer=partial(nn.LayerNorm)), torch.randn(2, 3, 4, 6)
    expected, seen = layer(x), []
    getattr(layer, watched).register_forward_hook(lambda _module, inputs, output: seen.append((*inputs, output)))
    torch.testing.assert_close(layer(x), expected)
    ((given, output),) = seen
    torch.testing.assert_close(getattr(layer, watched)(given), output)
