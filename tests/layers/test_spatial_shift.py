import pytest
import torch

from allmlp.layers import SpatialShift
from tests.layers.parity import assert_matches
from tests.ops.test_spatial_shift import ORDERS, loop


@pytest.mark.parametrize("order", ORDERS)
def test_matches_reference(order) -> None:
    assert_matches(SpatialShift(order), lambda p, x: loop(x, order), torch.randn(2, 3, 4, 7))


def test_representation_names_the_order() -> None:
    assert repr(SpatialShift("height_first")) == "SpatialShift(order='height_first')"


def test_unknown_order_is_refused() -> None:
    with pytest.raises(ValueError, match="order must be one of width_first, height_first, got 'up'"):
        SpatialShift("up")
