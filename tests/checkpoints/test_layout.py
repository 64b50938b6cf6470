import pytest
import torch

from allmlp.checkpoints.layout import count, numbered, parse_size, patch_of, rename, shape, square_image
from allmlp.errors import UserError

WEIGHTS = {f"blocks.{index}.fc.weight": torch.zeros(2, 3) for index in range(11)}


def test_shapes_are_checked() -> None:
    assert shape(WEIGHTS, "blocks.0.fc.weight", 2) == (2, 3)
    with pytest.raises(UserError, match=r"'blocks\.0\.fc\.bias' is missing"):
        shape(WEIGHTS, "blocks.0.fc.bias", 1)
    with pytest.raises(UserError, match=r"shape \[2, 3\]; it should have 4 dimensions"):
        shape(WEIGHTS, "blocks.0.fc.weight", 4)


def test_modules_are_counted_by_number() -> None:
    assert count(WEIGHTS, "blocks.") == 11
    assert count(WEIGHTS, "layers.") == 0
    with pytest.raises(UserError, match=r"'blocks\.3' are missing"):
        count({name: tensor for name, tensor in WEIGHTS.items() if ".3." not in name}, "blocks.")


def test_renaming_uses_every_tensor_and_every_name() -> None:
    tensors = {"a.weight": torch.zeros(1), "a.bias": torch.ones(1), "a.b.gamma": torch.ones(2)}
    assert rename(tensors, {"a": "x", "a.b": "y.z"}).keys() == {"x.weight", "x.bias", "y.z.gamma"}
    with pytest.raises(UserError, match=r"1 not used by the architecture: a\.b\.gamma; 1 missing: c"):
        rename(tensors, {"a": "x", "c": "d"})


def test_a_block_may_have_parameters_of_its_own() -> None:
    assert numbered({"": "", "fc": "linear"}, "layers.3", "blocks.7") == {
        "layers.3": "blocks.7",
        "layers.3.fc": "blocks.7.linear",
    }


def test_a_grid_is_square_unless_given() -> None:
    assert square_image(9, (2, 4), {}) == (6, 12)
    assert square_image(6, (2, 4), {"img_size": (4, 12)}) == (4, 12)
    with pytest.raises(UserError, match="6 tokens are no square grid"):
        square_image(6, (2, 4), {})
    with pytest.raises(UserError, match="does not fit"):
        square_image(6, (2, 4), {"img_size": (5, 12)})


def test_a_patch_is_square_and_coloured_unless_given() -> None:
    assert patch_of(192, {}) == (3, (8, 8))
    assert patch_of(192, {"in_chans": 12}) == (12, (4, 4))
    assert patch_of(192, {"patch_size": (4, 16)}) == (3, (4, 16))
    with pytest.raises(UserError, match="A patch has 190 numbers"):
        patch_of(190, {})


@pytest.mark.parametrize("value", [56, [56, 56], (56, 56), "56", "56x56"])
def test_sizes_are_read(value: object) -> None:
    assert parse_size(value) == (56, 56)


@pytest.mark.parametrize("value", [0, -1, 1.5, None, [], [1, 2, 3], "a", "1x", True, {"a": 1}])
def test_sizes_that_make_no_sense_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="one number of pixels from 1 to 8192"):
        parse_size(value)
