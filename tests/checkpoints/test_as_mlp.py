import pytest
import torch

import allmlp
from allmlp.checkpoints import MissingFacts
from allmlp.checkpoints.conversion import LAYOUTS, convert_checkpoint, convert_state_dict, write_run_directory
from allmlp.checkpoints.reading import read_checkpoint
from allmlp.checkpoints.unwrapping import unwrap
from allmlp.errors import UserError
from tests.checkpoints.parity import GOLDEN

PATH = GOLDEN / "as_mlp_shift5" / "checkpoint.pth"
# A segmentation model as mmsegmentation saves it. Its name says shift5, its configuration sets 3.
BACKBONE = GOLDEN / "as_mlp_backbone_shift3" / "checkpoint.pth"


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
        convert_state_dict({**weights, "config": config})
    assert caught.value.names == ("shift_size",)


@pytest.mark.parametrize("shift_size", [4, 0, "5", True])
def test_it_has_to_be_odd(weights: dict[str, torch.Tensor], shift_size: object) -> None:
    with pytest.raises(UserError, match=rf"shift_size is {shift_size!r}; it should be"):
        convert_state_dict(weights, facts={"shift_size": shift_size})


def test_the_image_size_is_for_preparing_images(weights: dict[str, torch.Tensor]) -> None:
    stored = {"MODEL": {"ASMLP": {"SHIFT_SIZE": 5}}, "DATA": {"IMG_SIZE": 64}}
    model = convert_state_dict({**weights, "config": stored}).model
    assert model.pretrained_cfg["input_size"] == (3, 64, 64)
    model = convert_state_dict({**weights, "config": stored}, facts={"img_size": [32, 64]}).model
    assert model.pretrained_cfg["input_size"] == (3, 32, 64)


def test_a_stem_without_norm_is_refused_by_name(weights: dict[str, torch.Tensor]) -> None:
    for parameter in ("weight", "bias"):
        del weights[f"patch_embed.norm.{parameter}"]
    with pytest.raises(UserError, match=r"1 missing: patch_embed\.norm"):
        convert_state_dict(weights, facts={"shift_size": 5})


class TestBackbone:
    @pytest.fixture
    def weights(self) -> dict[str, torch.Tensor]:
        return unwrap(read_checkpoint(BACKBONE), LAYOUTS).tensors

    def test_it_becomes_a_features_only_model(self) -> None:
        model = allmlp.convert(BACKBONE)
        assert model.feature_info.reduction() == [4, 8, 16, 32]
        assert model.feature_info.channels() == [4, 8, 16, 32]
        maps = model(torch.randn(1, 3, 64, 96))
        assert [tuple(y.shape[1:]) for y in maps] == [(4, 16, 24), (8, 8, 12), (16, 4, 6), (32, 2, 3)]

    def test_what_is_left_out_is_said(self) -> None:
        notes = convert_checkpoint(BACKBONE).notes
        assert notes[0] == "The part 'state_dict.backbone' is taken, without 'neck', 'decode_head'."

    def test_the_configuration_is_believed_not_the_name(self, weights: dict[str, torch.Tensor]) -> None:
        meta = read_checkpoint(BACKBONE)["meta"]
        assert "shift5" in meta["exp_name"]
        model = convert_state_dict({**weights, "meta": meta}).model
        assert model.model.blocks[0].axial_shift.shift_size == 3

    @pytest.mark.parametrize(
        "meta",
        [
            None,
            {"exp_name": "upernet_asmlp_tiny_patch4_shift5.py"},
            {"config": 3},
            {"config": "dict(shift_size=3), dict(shift_size=5)"},
        ],
        ids=["none", "name alone", "no text", "two of them"],
    )
    def test_without_one_shift_size_it_is_asked_for(self, weights: dict[str, torch.Tensor], meta: object) -> None:
        with pytest.raises(MissingFacts, match="5 or 3 in the published ones, whose names say shift5") as caught:
            convert_state_dict({**weights, "meta": meta})
        assert caught.value.names == ("shift_size",)

    def test_levels_are_those_with_a_norm(self, weights: dict[str, torch.Tensor]) -> None:
        every = convert_state_dict(weights, facts={"shift_size": 3}).model
        fewer = {name: tensor for name, tensor in weights.items() if not name.startswith("norm1.")}
        model = convert_state_dict(fewer, facts={"shift_size": 3}).model
        assert model.feature_info.reduction() == [4, 16, 32]
        images = torch.randn(1, 3, 32, 32)
        for y, expected in zip(model(images), [every(images)[level] for level in (0, 2, 3)], strict=True):
            torch.testing.assert_close(y, expected, rtol=0, atol=0)

    def test_the_run_directory_gives_it_back(self, tmp_path) -> None:
        found = convert_checkpoint(BACKBONE)
        write_run_directory(found, tmp_path / "run")
        images = torch.randn(1, 3, 32, 32)
        for y, expected in zip(allmlp.load(tmp_path / "run")(images), found.model(images), strict=True):
            torch.testing.assert_close(y, expected, rtol=0, atol=0)
