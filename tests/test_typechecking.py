import jaxtyping
import pytest
import torch

from allmlp.layers import Affine
from allmlp.ops import axial_shift


def test_axes_of_the_package_are_checked() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        axial_shift(torch.zeros(2, 3, 4), 3, "width")
    with pytest.raises(jaxtyping.TypeCheckError):
        Affine(4)(torch.zeros(2, 4, dtype=torch.int64))


def test_other_arguments_are_left_to_the_package() -> None:
    with pytest.raises(ValueError, match="shift_size must be odd"):
        axial_shift(torch.zeros(2, 3, 4, 5), 2.0, "width")


@pytest.mark.usefixtures("unchecked")
def test_checks_can_be_left_out() -> None:
    assert axial_shift(torch.zeros(2, 3, 4, 5, dtype=torch.int64), 3, "width").shape == (2, 3, 4, 5)
