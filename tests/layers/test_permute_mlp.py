import pytest
import torch

from allmlp.layers import PermuteMLP, WeightedPermuteMLP
from tests.layers.parity import assert_matches, channel_mlp, linear

# (grid, channels, segments): the paper's segments = height = width, a rectangle, one segment, one channel a segment.
CASES = [((4, 4), 8, 4), ((2, 3), 12, 4), ((3, 1), 8, 1), ((2, 2), 8, 8)]


def branches(p, x, segments):
    """Algorithm 1 with explicit loops: each segment's column (or row) of H·S numbers goes through one linear map."""
    batch, height, width, channels = x.shape
    size = channels // segments
    along_height, along_width = torch.zeros_like(x), torch.zeros_like(x)
    for n in range(segments):
        own = slice(n * size, (n + 1) * size)
        for j in range(width):
            column = x[:, :, j, own].reshape(batch, height * size)
            along_height[:, :, j, own] = (column @ p["mlp_h.weight"].T).reshape(batch, height, size)
        for i in range(height):
            row = x[:, i, :, own].reshape(batch, width * size)
            along_width[:, i, :, own] = (row @ p["mlp_w.weight"].T).reshape(batch, width, size)
    return along_height, along_width, linear(p, "mlp_c", x)


def weighted(p, x, segments):
    mixed = branches(p, x, segments)
    pooled = sum(branch.mean((1, 2)) for branch in mixed)
    shares = channel_mlp(p, "reweight", pooled).reshape(*pooled.shape, 3).softmax(2)
    return linear(p, "proj", sum(branch * shares[:, None, None, :, k] for k, branch in enumerate(mixed)))


@pytest.mark.parametrize(("grid", "channels", "segments"), CASES)
def test_matches_reference(grid, channels, segments) -> None:
    assert_matches(
        PermuteMLP(channels, grid, segments),
        lambda p, x: linear(p, "proj", sum(branches(p, x, segments))),
        torch.randn(2, *grid, channels),
    )


@pytest.mark.parametrize(("grid", "channels", "segments"), CASES)
def test_weighted_matches_reference(grid, channels, segments) -> None:
    assert_matches(
        WeightedPermuteMLP(channels, grid, segments),
        lambda p, x: weighted(p, x, segments),
        torch.randn(2, *grid, channels),
    )


def test_mixing_has_no_bias() -> None:
    layer = WeightedPermuteMLP(8, (4, 4), 4)
    assert [n for n, _ in layer.named_parameters() if n.startswith("mlp_")] == [
        "mlp_h.weight",
        "mlp_w.weight",
        "mlp_c.weight",
    ]


def test_segments_must_divide_the_channels() -> None:
    with pytest.raises(ValueError, match="segments must divide the 8 channels, got 3"):
        PermuteMLP(8, (4, 4), 3)


def test_another_map_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the input's map is \(4, 5\), this layer was built for \(4, 4\)"):
        WeightedPermuteMLP(8, (4, 4), 4)(torch.randn(1, 4, 5, 8))


@pytest.mark.parametrize("watched", ["mlp_h", "mlp_w"])
def test_hooks_see_what_operators_could_take_over(watched) -> None:
    layer, x = PermuteMLP(8, (2, 3), 4), torch.randn(2, 2, 3, 8)
    expected, seen = layer(x), []
    getattr(layer, watched).register_forward_hook(lambda _module, inputs, output: seen.append((*inputs, output)))
    torch.testing.assert_close(layer(x), expected)
    ((given, output),) = seen
    torch.testing.assert_close(getattr(layer, watched)(given), output)


def test_another_grid_is_told_by_the_linear_maps() -> None:
    layer = PermuteMLP(8, (4, 4), 4)
    layer.set_grid_size((4, 4), (6, 2))
    for linear_map in (layer.mlp_h, layer.mlp_w):
        assert (linear_map.out_features, linear_map.in_features) == linear_map.weight.shape
