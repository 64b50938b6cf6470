import pytest
import torch

from allmlp.layers import AxialShift
from tests.layers.parity import assert_matches, gelu, linear, sample_norm
from tests.ops.test_axial_shift import loop


def reference(shift_size):
    def mix(p, x):
        x = gelu(sample_norm(p, "norm1", linear(p, "conv1", x)))
        along_width = gelu(linear(p, "conv2_1", loop(x, shift_size, "width")))
        along_height = gelu(linear(p, "conv2_2", loop(x, shift_size, "height")))
        return linear(p, "conv3", sample_norm(p, "norm2", along_width + along_height))

    return mix


@pytest.mark.parametrize("shift_size", [1, 3, 5, 7])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 1, 1, 6)], ids=str)
def test_matches_reference(shift_size, shape) -> None:
    assert_matches(AxialShift(shape[-1], shift_size), reference(shift_size), torch.randn(shape))


def test_takes_any_map_size() -> None:
    layer = AxialShift(8, 5)
    for size in ((1, 9), (7, 2), (16, 16)):
        assert layer(torch.randn(1, *size, 8)).shape == (1, *size, 8)


def test_dropout_acts_on_the_output() -> None:
    layer = AxialShift(8, 3, drop=0.5)
    assert (layer(torch.randn(2, 4, 4, 8)) == 0).float().mean() > 0.3
    assert (layer.eval()(torch.randn(2, 4, 4, 8)) != 0).all()


def test_shift_size_must_be_odd() -> None:
    with pytest.raises(ValueError, match="shift_size must be odd and positive, got 4"):
        AxialShift(8, 4)


@pytest.mark.parametrize("watched", ["conv2_1", "conv2_2"])
def test_hooks_see_what_operators_could_take_over(watched) -> None:
    layer, x = AxialShift(8, 3), torch.randn(2, 3, 4, 8)
    expected, seen = layer(x), []
    getattr(layer, watched).register_forward_hook(lambda _module, inputs, output: seen.append((*inputs, output)))
    torch.testing.assert_close(layer(x), expected)
    ((given, output),) = seen
    torch.testing.assert_close(getattr(layer, watched)(given), output)


def test_a_norm_that_is_watched_is_called() -> None:
    layer, seen = AxialShift(6, 3), []
    layer.norm2.register_forward_hook(lambda *_: seen.append(1))
    layer(torch.randn(1, 4, 4, 6))
    assert seen == [1]
