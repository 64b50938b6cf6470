"""Layers whose weights belong to positions, at another grid."""

import math

import pytest
import torch
from torch import nn

from allmlp.layers import PermuteMLP, SpatialGatingUnit, TokenMixingMLP, WeightedPermuteMLP
from allmlp.ops.resampling import resampling_matrix
from allmlp.vision.resmlp import ResMLPBlock
from tests.tolerances import assert_close

CHANNELS = 8


def gate_alone(layer, v):
    """What the unit multiplies `u` by, of values it takes as they are."""
    layer.norm = nn.Identity()
    return layer(torch.cat([torch.ones_like(v), v], -1).flatten(1, 2)).view_as(v)


def branches(layer, x):
    height, width, channels = layer.mix(x)
    return torch.cat([height, width, channels], -1)


# A layer for a grid, and its token mixing alone, which is applied to maps `[batch, rows, columns, channels]`.
LAYERS = {
    "TokenMixingMLP": (lambda grid: TokenMixingMLP(math.prod(grid), 5), lambda layer, x: layer(x.flatten(1, 2))),
    "SpatialGatingUnit": (lambda grid: SpatialGatingUnit(2 * CHANNELS, math.prod(grid)), gate_alone),
    "spatial heads": (lambda grid: SpatialGatingUnit(2 * CHANNELS, math.prod(grid), heads=2), gate_alone),
    "ResMLPBlock": (
        lambda grid: ResMLPBlock(CHANNELS, math.prod(grid)),
        lambda layer, x: layer.linear_tokens(x.flatten(1, 2)),
    ),
    "PermuteMLP": (lambda grid: PermuteMLP(CHANNELS, grid, 4), branches),
    "WeightedPermuteMLP": (lambda grid: WeightedPermuteMLP(CHANNELS, grid, 4), branches),
}


def random_layer(kind, grid):
    layer = LAYERS[kind][0](grid).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer, lambda x: LAYERS[kind][1](layer, x).flatten(1, -2)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("finer", [(3, 7), (6, 4)], ids=str)
def test_finer_grids_compute_the_same_of_enlarged_maps(kind, finer) -> None:
    """The definition: what was mixed on the coarse grid, enlarged, is what the finer grid mixes of the map enlarged."""
    grid = (3, 4)
    up = resampling_matrix(grid, finer)
    layer, mix = random_layer(kind, grid)
    x = torch.randn(2, *grid, CHANNELS, dtype=torch.float64)

    def enlarged(y):
        return torch.einsum("nt,btc->bnc", up, y)

    expected = enlarged(mix(x))
    layer.set_grid_size(grid, finer)
    assert_close(mix(enlarged(x.flatten(1, 2)).unflatten(1, finer)), expected)
    layer.set_grid_size(finer, grid)
    assert_close(enlarged(mix(x)), expected)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("other", [(2, 3), (5, 3), (2, 5)], ids=str)
def test_constant_maps_are_read_alike_on_every_grid(kind, other) -> None:
    """A layer of one position, enlarged: it reads means and writes constants."""
    layer, mix = random_layer(kind, (1, 1))
    colour = torch.randn(2, 1, 1, CHANNELS, dtype=torch.float64)
    expected = mix(colour)
    for grid, new_grid in (((1, 1), (3, 4)), ((3, 4), other)):
        layer.set_grid_size(grid, new_grid)
        assert_close(mix(colour.expand(2, *new_grid, CHANNELS)), expected.expand(2, math.prod(new_grid), -1))


@pytest.mark.parametrize("kind", LAYERS)
def test_the_same_grid_keeps_the_very_same_parameters(kind) -> None:
    layer, _ = random_layer(kind, (3, 4))
    before = dict(layer.named_parameters())
    layer.set_grid_size((3, 4), (3, 4))
    assert all(parameter is before[name] for name, parameter in layer.named_parameters())


@pytest.mark.parametrize("kind", LAYERS)
def test_frozen_parameters_stay_frozen(kind) -> None:
    layer, _ = random_layer(kind, (3, 4))
    layer.requires_grad_(False)
    layer.set_grid_size((3, 4), (5, 5))
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_toeplitz_units_have_no_grid() -> None:
    with pytest.raises(ValueError, match="a Toeplitz unit belongs to a sequence, not to a grid"):
        SpatialGatingUnit(8, 12, toeplitz=True).set_grid_size((3, 4), (5, 5))
