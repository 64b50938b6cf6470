import jaxtyping
import pytest
import torch

from allmlp.layers import Affine
from allmlp.ops import axial_shift
from tests.typechecking import CHECKS


def test_axes_of_the_package_are_checked() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        axial_shift(torch.zeros(2, 3, 4), 3, "width")
    with pytest.raises(jaxtyping.TypeCheckError):
        Affine(4)(torch.zeros(2, 4, dtype=torch.int64))


def test_other_arguments_are_left_to_the_package() -> None:
    with pytest.raises(ValueError, match="shift_size must be odd"):
        axial_shift(torch.zeros(2, 3, 4, 5), 2.0, "width")


@pytest.mark.parametrize("again", [False, True])
def test_the_first_calls_of_each_test_are_checked(again: bool) -> None:
    whole = torch.zeros(1, 2, 2, 3, dtype=torch.int64)
    with pytest.raises(jaxtyping.TypeCheckError):
        Affine(3)(whole)
    for _ in range(CHECKS):
        axial_shift(whole.float(), 3, "width")
    assert Affine(3)(whole).shape == whole.shape


@pytest.mark.usefixtures("unchecked")
def test_checks_can_be_left_out() -> None:
    assert axial_shift(torch.zeros(2, 3, 4, 5, dtype=torch.int64), 3, "width").shape == (2, 3, 4, 5)
