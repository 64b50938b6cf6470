"""Norms and the simple feature pyramid on the maps that timm's `features_only` gives."""

import pytest
import timm
import torch

from tests.vision.nano import NANO, shallow_model

STRIDES = {
    "gmlp_small_patch16_224": [4, 8, 16, 32],
    "mixer_base_patch32_224": [4, 8, 16, 32],
    "resmlp_12_patch16_224": [4, 8, 16, 32],
    "s2mlp_deep_patch16_224": [4, 8, 16, 32],
    "vip_small_patch7_224": [7, 14, 28, 56],
    "s2mlpv2_small_patch7_224": [7, 14, 28, 56],
    "asmlp_tiny_patch4_224": [4, 8, 16, 32],
}


@pytest.mark.parametrize("name", STRIDES)
def test_feature_info_is_what_comes_out(name) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, features_only=True, pyramid_channels=256)
        maps = model(torch.empty(1, 3, 224, 224))
    assert model.feature_info.reduction() == STRIDES[name]
    assert model.feature_info.channels() == [256] * 4
    assert [tuple(y.shape) for y in maps] == [(1, 256, 224 // stride, 224 // stride) for stride in STRIDES[name]]


@pytest.mark.parametrize(("patch_size", "finest"), [(1, 4), (3, 6), (4, 4), (5, 5), (8, 4), (12, 6), (14, 7), (15, 15)])
def test_strides_are_whole_and_at_least_four(patch_size, finest) -> None:
    with torch.device("meta"):
        model = timm.create_model(
            "gmlp_nano_patch4_32", patch_size=patch_size, img_size=60 * 14, features_only=True, pyramid_channels=8
        )
    assert model.feature_info.reduction() == [finest, 2 * finest, 4 * finest, 8 * finest]


@pytest.mark.parametrize("name", NANO)
def test_levels_are_made_from_the_last_map(name) -> None:
    torch.manual_seed(0)
    model = shallow_model(name, features_only=True, pyramid_channels=12)
    images = torch.randn(2, 3, 32, 32)
    whole = shallow_model(name)
    whole.load_state_dict(model.model.state_dict(), strict=False)
    last = whole.forward_intermediates(images, 1, intermediates_only=True)[0]
    maps = model(images)
    for level, expected in zip(maps, model.pyramid(last), strict=True):
        torch.testing.assert_close(level, expected, rtol=0, atol=0)
    sum(level.square().mean() for level in maps).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("indices", [(1, 2), (-1,), 3], ids=str)
def test_chosen_levels(indices) -> None:
    model = shallow_model("gmlp_nano_patch4_32", features_only=True, pyramid_channels=12, out_indices=indices)
    strides = [4, 8, 16, 32][-indices:] if isinstance(indices, int) else [[4, 8, 16, 32][i] for i in indices]
    assert model.feature_info.reduction() == strides
    assert [32 // y.shape[-1] for y in model(torch.randn(1, 3, 32, 32))] == strides
    assert len(model.pyramid.levels) == len(strides)


@pytest.mark.parametrize("name", NANO)
def test_every_level_has_a_norm_of_its_own(name) -> None:
    model = shallow_model(name, features_only=True, feature_norms=True, out_indices=(0, 1))
    images = torch.randn(2, 3, 32, 32)
    for norm in model.norms:
        for parameter in norm.parameters():
            torch.nn.init.normal_(parameter)
    whole = shallow_model(name)
    whole.load_state_dict(model.model.state_dict(), strict=False)
    maps = whole.forward_intermediates(images, (0, 1), output_fmt="NHWC", intermediates_only=True)
    for norm, y, expected in zip(model.norms, model(images), maps, strict=True):
        assert type(norm) is type(whole.norm)
        assert getattr(norm, "eps", None) == getattr(whole.norm, "eps", None)
        torch.testing.assert_close(y, norm(expected).permute(0, 3, 1, 2), rtol=0, atol=0)
    sum(level.square().mean() for level in model(images)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_any_size_stays_any_size() -> None:
    model = shallow_model("s2mlp_nano_patch4_32", features_only=True, pyramid_channels=12)
    assert [tuple(y.shape[2:]) for y in model(torch.randn(1, 3, 37, 50))] == [(10, 13), (5, 7), (3, 4), (2, 2)]


def test_a_column_is_brought_to_another_size() -> None:
    model = shallow_model("gmlp_nano_patch4_32", features_only=True, pyramid_channels=12)
    model.model.set_input_size((48, 64))
    assert [tuple(y.shape[2:]) for y in model(torch.randn(1, 3, 48, 64))] == [(12, 16), (6, 8), (3, 4), (2, 2)]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="pyramid_channels must be positive, got -1"):
        timm.create_model("gmlp_nano_patch4_32", features_only=True, pyramid_channels=-1)
    with pytest.raises(ValueError, match="pyramid_channels: one of them at a time, and with features_only=True"):
        timm.create_model("gmlp_nano_patch4_32", pyramid_channels=64)
    with pytest.raises(ValueError, match="norms like the model's final one on its maps; this model has none"):
        timm.create_model("gmlp_nano_patch4_32", final_norm=False, features_only=True, feature_norms=True)
    with pytest.raises(ValueError, match="feature_norms and pyramid_channels: one of them at a time"):
        timm.create_model("gmlp_nano_patch4_32", features_only=True, feature_norms=True, pyramid_channels=64)


@pytest.mark.parametrize(
    ("name", "arguments", "reductions"),
    [
        ("asmlp_nano_patch2_32", {"depths": (1, 1)}, [2, 4]),
        ("asmlp_nano_patch2_32", {"depths": (1, 1, 1, 1)}, [2, 4, 8, 16]),
        ("s2mlpv2_nano_patch2_32", {"depths": (1, 1)}, [2, 4]),
        ("vip_nano_patch4_32", {"depths": (1, 1), "embed_dims": (96, 96), "segments": (8, 8)}, [4, 4]),
    ],
)
def test_default_levels_follow_the_stages_asked_for(name, arguments, reductions) -> None:
    model = timm.create_model(name, features_only=True, **arguments)
    assert model.feature_info.reduction() == reductions
    assert [32 // y.shape[-1] for y in model(torch.randn(1, 3, 32, 32))] == reductions


def test_strides_follow_other_patches() -> None:
    model = shallow_model("s2mlp_nano_patch4_32", features_only=True, pyramid_channels=12)
    model.model.set_input_size(patch_size=8)
    assert model.feature_info.reduction() == [8, 16, 32, 64]
    assert [64 // y.shape[-1] for y in model(torch.randn(1, 3, 64, 64))] == [8, 16, 32, 64]
    model.model.set_input_size(patch_size=2)
    assert model.feature_info.reduction() == [2, 4, 8, 16]
