"""Weights to start from: run directories, checkpoints, and timm's own by name, here out of a local file."""

import functools
from pathlib import Path

import pytest
import timm
import torch

import allmlp
from allmlp.checkpoints import from_timm, pretrained
from allmlp.checkpoints.architecture import LanguageArchitecture, VisionArchitecture
from allmlp.checkpoints.conversion import write_run_directory
from allmlp.checkpoints.pretrained import find_pretrained
from allmlp.errors import UserError
from allmlp.training import vision
from tests.checkpoints import originals, parity
from tests.checkpoints.parity import GOLDEN
from tests.tolerances import PARITY
from tests.training.tiny import tiny_recipe

NAME = "gmlp_ti16_224"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that timm would have downloaded."""
    model = timm.create_model(NAME)
    originals.draw(model)
    path = tmp_path_factory.mktemp("hub") / "weights.pth"
    torch.save(model.state_dict(), path)
    return path


class TestTimm:
    def test_its_weights_compute_the_same_here(self, weights: Path) -> None:
        found = from_timm(NAME, pretrained_cfg_overlay={"file": str(weights)})
        assert (found.architecture.name, found.architecture.num_classes) == ("gmlp_tiny_patch16_224", 1000)
        assert found.notes == ()
        peer = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay={"file": str(weights)}).double().eval()
        x = torch.randn(1, 3, 224, 224, dtype=torch.float64)
        expected = peer(x)
        deviation = (found.model.double()(x) - expected).abs().max()
        assert deviation <= PARITY[torch.float64] * expected.abs().max()

    def test_images_are_prepared_and_classes_named_as_there(self, weights: Path) -> None:
        overlay = {"file": str(weights), "mean": (0.0, 0.0, 0.0), "interpolation": "bilinear", "crop_pct": 0.5}
        found = from_timm(NAME, pretrained_cfg_overlay=overlay)
        cfg = found.model.pretrained_cfg
        assert (cfg["mean"], cfg["std"], cfg["interpolation"], cfg["crop_pct"]) == (
            (0.0, 0.0, 0.0),
            (0.5, 0.5, 0.5),
            "bilinear",
            0.5,
        )
        assert found.classes is not None
        assert found.classes[1] == "goldfish, Carassius auratus"
        # Where classes shared a name, evaluation would count them as one.
        assert found.classes[134].startswith("crane: large long-necked wading bird")
        assert found.classes[517].startswith("crane: lifts and moves heavy objects")
        assert len(set(found.classes)) == 1000

    @pytest.mark.parametrize("subset", ["imagenet-1k", "imagenet-12k", "imagenet-21k", "imagenet-21k-miil"])
    def test_classes_of_every_imagenet_have_names_of_their_own(self, subset: str) -> None:
        info = timm.data.ImageNetInfo(subset)
        assert len(set(pretrained._class_names(info))) == info.num_classes()

    @pytest.mark.parametrize("channels", [1, 4])
    def test_images_of_other_channels_are_prepared_alike(self, weights: Path, tmp_path: Path, channels: int) -> None:
        overlay = {"file": str(weights), "mean": (0.2, 0.3, 0.4), "std": (0.5, 0.5, 0.5), "interpolation": "bilinear"}
        found = from_timm(NAME, in_chans=channels, pretrained_cfg_overlay=overlay)
        write_run_directory(found, tmp_path / "run")
        for model in (found.model, found.architecture.build(), allmlp.load(tmp_path / "run")):
            cfg = model.pretrained_cfg
            assert cfg["mean"] == pytest.approx([0.3] * channels)
            assert list(cfg["std"]) == [0.5] * channels
            assert tuple(cfg["input_size"]) == (channels, 224, 224)
            assert cfg["interpolation"] == "bilinear"

    def test_a_new_head_has_no_names(self, weights: Path) -> None:
        found = from_timm(NAME, num_classes=3, pretrained_cfg_overlay={"file": str(weights)})
        assert found.model.num_classes == 3
        assert found.classes is None

    def test_other_models_are_refused(self) -> None:
        with pytest.raises(UserError, match=r"no model 'gmlp_ti16_24'.*Did you mean 'gmlp_ti16_224'"):
            from_timm("gmlp_ti16_24")
        with pytest.raises(UserError, match=r"timm's resnet18 is none of its all-MLP .*mixer_b16_224\.goog_in21k"):
            from_timm("resnet18")
        with pytest.raises(UserError, match=r"timm's gmlp_nano_patch4_32 is none of"):
            from_timm("gmlp_nano_patch4_32")

    def test_weights_that_do_not_come_are_said(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="timm cannot give gmlp_ti16_224 with its weights"):
            from_timm(NAME, pretrained_cfg_overlay={"file": str(tmp_path / "nothing.pth")})

    def test_training_starts_from_it_by_name(
        self, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        local = functools.partial(timm.create_model, pretrained_cfg_overlay={"file": str(weights)})
        monkeypatch.setattr(pretrained.timm, "create_model", local)
        start = find_pretrained(f"timm:{NAME}")
        monkeypatch.undo()
        recipe = tiny_recipe(tmp_path, model=None, model_args={}, img_size=None, start_from=f"timm:{NAME}")
        architecture, arguments, _ = vision.planned_model(recipe, start)
        assert architecture == "gmlp_tiny_patch16_224"
        model = vision.build_model(recipe, architecture, arguments, ["a", "b"], start)
        assert torch.equal(model.blocks[29].proj_in.weight, start.model.blocks[29].proj_in.weight)
        assert model.num_classes == 2
        assert model.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)


class TestFound:
    def test_a_run_directory(self, tmp_path: Path) -> None:
        converted = parity.golden(GOLDEN / "vip_small7").convert()
        write_run_directory(converted, tmp_path / "run")
        found = find_pretrained(tmp_path / "run")
        assert isinstance(found.architecture, VisionArchitecture)
        assert found.architecture.model_args == converted.architecture.model_args
        assert torch.equal(found.model.head.weight, converted.model.head.weight)

    def test_a_checkpoint(self) -> None:
        found = find_pretrained(GOLDEN / "as_mlp_shift5" / "checkpoint.pth")
        assert found.architecture.name.startswith("asmlp_")

    def test_a_checkpoint_that_lacks_facts_says_so(self) -> None:
        with pytest.raises(UserError, match="does not store causal and gate_act"):
            find_pretrained(GOLDEN / "lucidrains_masked_lm" / "checkpoint.pth")

    def test_a_language_model_is_no_image_classifier(self, tmp_path: Path) -> None:
        found = find_pretrained(GOLDEN / "labml_causal_lm" / "checkpoint.pth")
        assert isinstance(found.architecture, LanguageArchitecture)
        recipe = tiny_recipe(tmp_path, start_from="x.pth")
        with pytest.raises(UserError, match=r"x\.pth holds a GMLPForCausalLM, not an image classifier"):
            vision.planned_model(recipe, found)

    def test_a_backbone_is_no_image_classifier(self, tmp_path: Path) -> None:
        found = find_pretrained(GOLDEN / "as_mlp_backbone_shift3" / "checkpoint.pth")
        recipe = tiny_recipe(tmp_path, start_from="x.pth")
        with pytest.raises(UserError, match=r"x\.pth is a backbone here: it gives features, not classes"):
            vision.planned_model(recipe, found)

    def test_nothing(self) -> None:
        with pytest.raises(UserError, match="There is no run directory no/such/run"):
            find_pretrained("no/such/run")


def test_training_goes_on_from_a_checkpoint_of_another_project(tmp_path: Path) -> None:
    original = originals.timm_resmlp(grid=(2, 2), patch=4, classes=5)
    torch.save(original.model.state_dict(), tmp_path / "resmlp.pth")
    recipe = tiny_recipe(
        tmp_path, model=None, model_args={}, img_size=None, start_from=str(tmp_path / "resmlp.pth"), lr=1e-9, epochs=1
    )
    vision.train(recipe, tmp_path / "run")
    trained = allmlp.load(tmp_path / "run")
    assert trained.num_classes == 3
    torch.testing.assert_close(trained.stem.proj.weight, original.model.stem.proj.weight)
