import torch

from allmlp.layers import Affine
from tests.layers.parity import assert_matches


def test_matches_reference() -> None:
    assert_matches(Affine(5), lambda p, x: p["alpha"] * x + p["beta"], torch.randn(2, 3, 4, 5))
    assert_matches(Affine(5), lambda p, x: p["alpha"] * x + p["beta"], torch.randn(5))


def test_starts_as_the_identity() -> None:
    x = torch.randn(2, 7)
    torch.testing.assert_close(Affine(7)(x), x, rtol=0, atol=0)
