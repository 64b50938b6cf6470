import pytest
import torch

from allmlp.checkpoints import MissingFacts
from allmlp.checkpoints.conversion import convert_checkpoint, convert_state_dict
from allmlp.checkpoints.reading import read_checkpoint
from allmlp.errors import UserError
from tests.checkpoints.parity import GOLDEN

PATH = GOLDEN / "as_mlp_shift5" / "checkpoint.pth"


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return read_checkpoint(PATH)["model"]


def test_the_shift_size_is_taken_from_the_stored_configuration() -> None:
    assert convert_checkpoint(PATH).model.blocks[0].axial_shift.shift_size == 5


def test_a_shift_size_that_is_given_wins() -> None:
    assert convert_checkpoint(PATH, facts={"shift_size": 3}).model.blocks[0].axial_shift.shift_size == 3


@pytest.mark.parametrize("config", [None, "a string", {}, {"MODEL": {"TYPE": "asmlp"}}])
def test_without_one_it_is_asked_for(weights: dict[str, torch.Tensor], config: object) -> None:
    with pytest.raises(MissingFacts, match="does not store shift_size") as caught:
        convert_state_dict(weights, beside={"config": config})
    assert caught.value.names == ("shift_size",)


@pytest.mark.parametrize("shift_size", [4, 0, "5", True])
def test_it_has_to_be_odd(weights: dict[str, torch.Tensor], shift_size: object) -> None:
    with pytest.raises(UserError, match=rf"shift_size is {shift_size!r}; it should be"):
        convert_state_dict(weights, facts={"shift_size": shift_size})


def test_the_image_size_is_for_preparing_images(weights: dict[str, torch.Tensor]) -> None:
    stored = {"MODEL": {"ASMLP": {"SHIFT_SIZE": 5}}, "DATA": {"IMG_SIZE": 64}}
    model = convert_state_dict(weights, beside={"config": stored}).model
    assert model.pretrained_cfg["input_size"] == (3, 64, 64)
    model = convert_state_dict(weights, facts={"img_size": [32, 64]}, beside={"config": stored}).model
    assert model.pretrained_cfg["input_size"] == (3, 32, 64)


def test_a_stem_without_norm_is_refused_by_name(weights: dict[str, torch.Tensor]) -> None:
    for parameter in ("weight", "bias"):
        del weights[f"patch_embed.norm.{parameter}"]
    with pytest.raises(UserError, match=r"1 missing: patch_embed\.norm"):
        convert_state_dict(weights, facts={"shift_size": 5})
