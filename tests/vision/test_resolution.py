"""Models at another image size than the one their weights were trained at."""

import copy
from functools import cache

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from allmlp.vision import VisionPermutator
from allmlp.vision.resolution import resample_state_dict
from tests.tolerances import assert_close
from tests.vision.nano import ANY_SIZE, NANO, ONE_SIZE, shallow_model

SIZES = [48, (40, 24)]


@pytest.fixture(params=NANO)
def name(request) -> str:
    return request.param


def random_model(name: str, **arguments) -> torch.nn.Module:
    """A model whose every parameter is random."""
    model = shallow_model(name, **arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def assert_same(state, expected) -> None:
    torch.testing.assert_close(dict(state), dict(expected), rtol=0, atol=0)


def pair(size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_way_to_another_size_is_the_same(name, size, tmp_path) -> None:
    """On a live model, by torch's `load_state_dict`, and by timm's `checkpoint_path` and `pretrained_cfg`."""
    source = random_model(name)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    file = {"file": str(tmp_path / "weights.pth")}
    live = copy.deepcopy(source)
    live.set_input_size(size)
    loaded = shallow_model(name, img_size=size)
    loaded.load_state_dict(source.state_dict())
    for model in (
        loaded,
        shallow_model(name, img_size=size, checkpoint_path=tmp_path / "weights.pth"),
        shallow_model(name, img_size=size, pretrained=True, pretrained_cfg_overlay=file),
    ):
        assert_same(model.state_dict(), live.state_dict())
    images = torch.randn(2, 3, *pair(size))
    torch.testing.assert_close(live(images), loaded(images), rtol=0, atol=0)
    assert live(images).shape == (2, 10)
    assert timm.data.resolve_data_config(model=live)["input_size"] == (3, *pair(size))


def features(name, **arguments):
    return shallow_model(name, features_only=True, out_indices=1, **arguments)


def sequence(name, **arguments):
    return torch.nn.Sequential(torch.nn.Identity(), random_model(name, **arguments))


@pytest.mark.parametrize("wrapped", [features, sequence])
@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_a_model_inside_another_module_is_resampled_too(name, wrapped, assign) -> None:
    source, model = wrapped(name), wrapped(name, img_size=48)
    prefix = next(key for key in source.state_dict()).partition("stem")[0]
    assert model.load_state_dict(source.state_dict(), assign=assign) == ([], [])
    source.get_submodule(prefix.rstrip(".")).set_input_size(48)
    assert_same(model.state_dict(), source.state_dict())
    state = {**source.state_dict(), prefix + "stem.what": torch.zeros(1)}
    del state[prefix + "stem.proj.bias"]
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == ([prefix + "stem.proj.bias"], [prefix + "stem.what"])


def test_versions_of_layers_are_kept(name) -> None:
    """torch hangs them on a state dict; quantised layers cannot be read without."""
    state = random_model(name).state_dict()
    assert resample_state_dict(state, shallow_model(name, img_size=48))._metadata == state._metadata


@pytest.mark.parametrize("name", ONE_SIZE)
def test_a_constant_stays_a_constant(name) -> None:
    """A model made for one token, at any size: it mixes by means, so that a constant map stays one."""
    arguments = {"downsample_after": ()} if name.startswith("vip") else {}
    model = random_model(name, img_size=4, **arguments).double()
    colour = torch.randn(1, 3, 1, 1, dtype=torch.float64)
    expected = model(colour.expand(1, 3, 4, 4))
    for size in (32, 48, (40, 24)):
        model.set_input_size(size)
        assert_close(model(colour.expand(1, 3, *pair(size))), expected)


def test_up_and_back_gives_the_weights_back(name) -> None:
    model = random_model(name)
    before = copy.deepcopy(model.state_dict())
    for size in ((48, 40), 32):
        model.set_input_size(size)
    torch.testing.assert_close(model.state_dict(), before, rtol=1e-4, atol=1e-4)


def test_the_same_size_leaves_the_very_same_tensors(name) -> None:
    model = random_model(name)
    before = dict(model.named_parameters())
    model.set_input_size(32)
    model.set_input_size((32, 32), model.stem.patch_size)
    assert all(parameter is before[key] for key, parameter in model.named_parameters())
    resampled = resample_state_dict(model.state_dict(), model)
    assert all(value is resampled[key] or torch.equal(value, resampled[key]) for key, value in before.items())


@pytest.mark.parametrize("name", ONE_SIZE)
def test_one_side_alone_leaves_what_mixes_along_the_other(name) -> None:
    model = random_model(name)
    before = dict(model.named_parameters())
    model.set_input_size((32, 48))
    changed = {key for key, parameter in model.named_parameters() if parameter is not before[key]}
    assert changed
    assert not any("mlp_h" in key for key in changed)
    assert all(before[key].requires_grad == parameter.requires_grad for key, parameter in model.named_parameters())
    assert model(torch.randn(1, 3, 32, 48)).shape == (1, 10)


@pytest.mark.parametrize("name", ONE_SIZE)
def test_resampled_models_train(name) -> None:
    model = random_model(name).double()
    model.set_input_size((40, 24), patch_kernel=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images = torch.randn(2, 3, 40, 24, dtype=torch.float64)
    before = copy.deepcopy(model.state_dict())
    model(images).square().sum().backward()
    assert all(parameter.is_leaf and parameter.grad is not None for parameter in model.parameters())
    optimizer.step()
    assert all(not torch.equal(parameter, before[key]) for key, parameter in model.named_parameters())


def test_features_follow_the_size(name) -> None:
    model = timm.create_model(name, features_only=True).eval()
    model.model.set_input_size((48, 64))
    for y, channels, reduction in zip(
        model(torch.randn(1, 3, 48, 64)), model.feature_info.channels(), model.feature_info.reduction(), strict=True
    ):
        assert y.shape == (1, channels, 48 // reduction, 64 // reduction)


def test_features_of_larger_patches(name) -> None:
    model = random_model(name)
    former = [info["reduction"] for info in model.feature_info]
    patch = model.stem.patch_size[0]
    model.set_input_size(64, patch_size=2 * patch)
    assert [info["reduction"] for info in model.feature_info] == [2 * reduction for reduction in former]
    _, maps = model.forward_intermediates(torch.randn(1, 3, 64, 64))
    for y, info in zip(maps, model.feature_info, strict=True):
        assert y.shape[2:] == (64 // info["reduction"], 64 // info["reduction"])


def test_larger_patches_see_larger_pictures_as_before(name) -> None:
    """Patches and pictures of twice the size: the same tokens, as far as timm's resampling goes."""
    model = random_model(name)
    small = F.avg_pool2d(torch.randn(2, 3, 64, 64), 2)
    large = F.interpolate(small, scale_factor=2, mode="bicubic", antialias=True)
    expected = model(small)
    model.set_input_size(64, patch_size=2 * model.stem.patch_size[0])
    assert F.cosine_similarity(model(large), expected).min() > 0.95


def test_kernels_may_be_larger_than_patches(name) -> None:
    """Tokens of enlarged pictures: each patch sees what it saw of the picture, and there are more of them."""
    model = random_model(name)
    patch = model.stem.patch_size[0]
    small = F.avg_pool2d(torch.randn(1, 3, 64, 64), 2)
    large = F.interpolate(small, scale_factor=3, mode="bicubic", antialias=True)
    expected = model.stem(small)
    model.set_input_size(96, patch_kernel=3 * patch)
    tokens = model.stem(large)
    assert tokens.shape[1:3] == (96 // patch, 96 // patch)
    # Every third token lies where one of the small picture's lies.
    assert F.cosine_similarity(tokens[:, 1::3, 1::3].flatten(1), expected.flatten(1)) > 0.95
    built = shallow_model(name, img_size=96, patch_kernel=3 * patch)
    built.load_state_dict(model.state_dict())
    torch.testing.assert_close(built(large), model(large), rtol=0, atol=0)


def test_input_size_follows_timms_convention(name) -> None:
    """The arguments of timm's own models, and what they leave alone."""
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1)
    for model in (theirs, shallow_model(name, img_size=64, patch_size=16)):
        model.set_input_size(img_size=(96, 64))
        assert model(torch.randn(1, 3, 96, 64)).ndim == 2
        model.set_input_size(img_size=(96, 48), patch_size=(12, 8))
        embedding = model.patch_embed if model is theirs else model.stem
        assert embedding.proj.weight.shape[2:] == (12, 8)
        assert model(torch.randn(1, 3, 96, 48)).ndim == 2
        model.set_input_size()
        assert model(torch.randn(1, 3, 96, 48)).ndim == 2


@pytest.mark.skipif(not hasattr(timm.models, "get_model_args"), reason="this timm saves no arguments of its models")
def test_timm_saves_a_model_of_another_size_as_what_it_is(name, tmp_path) -> None:
    model = random_model(name)
    patch = 2 * model.stem.patch_size[0]
    model.set_input_size((48, 64), patch_size=patch, patch_kernel=patch + 2)
    timm.models.save_for_hf(model, str(tmp_path))
    saved = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert_same(saved.state_dict(), model.state_dict())
    images = torch.randn(1, 3, 48, 64)
    torch.testing.assert_close(saved(images), model(images), rtol=0, atol=0)
    assert timm.data.resolve_model_data_config(saved)["input_size"] == (3, 48, 64)


@pytest.mark.parametrize("name", ONE_SIZE)
def test_a_size_that_no_grid_fits_is_refused_and_changes_nothing(name) -> None:
    model = random_model(name)
    before = dict(model.named_parameters())
    with pytest.raises(ValueError, match=r"50×30 pixels .* patches of 4×4.*nearest sizes are 48×28 and 52×32"):
        model.set_input_size((50, 30))
    with pytest.raises(ValueError, match=r"2×2 pixels .*nearest sizes are 4×4$"):
        model.set_input_size(2)
    with pytest.raises(ValueError, match="kernel of 3×3 pixels leaves pixels unseen between patches of 4×4"):
        model.set_input_size(48, patch_kernel=3)
    assert all(parameter is before[key] for key, parameter in model.named_parameters())
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize("name", [name for name in ONE_SIZE if not name.startswith("vip")])
def test_weights_of_an_unknown_grid_ask_for_it(name) -> None:
    source, model = random_model(name, img_size=(8, 24)), shallow_model(name)
    with pytest.raises(ValueError, match=r"made for 12 tokens, .* nor of the proportions of 8×8: name the grid"):
        model.load_state_dict(source.state_dict())
    model.load_state_dict(resample_state_dict(source.state_dict(), model, grid=(2, 6)))
    source.set_input_size(32)
    assert_same(model.state_dict(), source.state_dict())
    with pytest.raises(ValueError, match="a weight for 64 tokens does not belong to a grid of 7×9"):
        resample_state_dict(source.state_dict(), model, grid=(7, 9))


def test_the_grid_of_vip_is_told_by_its_weights() -> None:
    source = random_model("vip_nano_patch4_32", img_size=(8, 24))
    model = shallow_model("vip_nano_patch4_32")
    model.load_state_dict(source.state_dict())
    source.set_input_size(32)
    assert_same(model.state_dict(), source.state_dict())


@pytest.mark.parametrize("name", ANY_SIZE)
def test_any_size_needs_no_resampling(name) -> None:
    model = random_model(name)
    before = copy.deepcopy(model.state_dict())
    images = torch.randn(1, 3, 37, 50)
    expected = model(images)
    model.set_input_size((37, 50))
    torch.testing.assert_close(model(images), expected, rtol=0, atol=0)
    assert_same(model.state_dict(), before)


@pytest.mark.parametrize("name", ANY_SIZE)
@given(height=st.integers(4, 41), width=st.integers(4, 41))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_stage_of_any_size_pads_at_the_border(name, height, width) -> None:
    """Each map has as many positions as patches and their halvings begin in the image."""
    model = _any_size(name)
    _, maps = model.forward_intermediates(torch.randn(1, 3, height, width))
    for y, info in zip(maps, model.feature_info, strict=True):
        assert y.shape[2:] == (-(-height // info["reduction"]), -(-width // info["reduction"]))


@cache
def _any_size(name: str) -> torch.nn.Module:
    return random_model(name)


@pytest.mark.parametrize("name", NANO)
def test_an_image_without_pixels_is_refused(name) -> None:
    with pytest.raises(ValueError, match="0×5 pixels"):
        shallow_model(name)(torch.randn(1, 3, 0, 5))


@pytest.mark.parametrize("size", [-4, 0, 2])
def test_sizes_that_no_model_takes_are_refused_where_any_size_is(size: int) -> None:
    model = timm.create_model("asmlp_nano_patch2_32")
    with pytest.raises(ValueError, match=r"too small for this model's last stage|must be a number of pixels from 1 on"):
        model.set_input_size(size)
    assert model.pretrained_cfg["input_size"] == (3, 32, 32)


COMPUTED = {
    "gmlp_nano_patch4_32": ("blocks.0.sgu", "", "weight"),
    "mixer_nano_patch4_32": ("blocks.0.mlp_tokens", "fc1", "fc1.weight"),
    "resmlp_nano_patch4_32": ("blocks.0", "linear_tokens", "linear_tokens.weight"),
    "vip_nano_patch4_32": ("blocks.0.attn", "mlp_h", "mlp_h.weight"),
}


@pytest.mark.parametrize("reparametrised", [lambda layer: prune.random_unstructured(layer, "weight", 0.5), weight_norm])
@pytest.mark.parametrize("name", COMPUTED)
def test_weights_computed_from_others_load_and_stay_at_their_size(name, reparametrised) -> None:
    """Pruned and normalised ones, whose own parameters have other names."""
    bound, part, weight = COMPUTED[name]
    source, model = random_model(name), random_model(name)
    for each in (source, model):
        reparametrised(each.get_submodule(f"{bound}.{part}".rstrip(".")))
    model.load_state_dict(source.state_dict())
    before = dict(model.named_parameters())
    message = rf"{bound} cannot be brought to another grid: its {weight} cannot be replaced, being computed from other"
    with pytest.raises(ValueError, match=message):
        model.set_input_size(48)
    assert all(parameter is before[key] for key, parameter in model.named_parameters())
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(model(images), source(images), rtol=0, atol=0)
    model.set_input_size(32)


def test_the_grid_of_vip_is_told_by_maps_that_are_not_halved() -> None:
    """Without the first block's weights nothing tells it."""
    source = random_model("vip_nano_patch4_32", downsample_after=(1,))
    model = shallow_model("vip_nano_patch4_32", downsample_after=(1,), img_size=48)
    state = {key: value for key, value in source.state_dict().items() if not key.startswith("blocks.0.")}
    assert_same(resample_state_dict(state, model), state)


def test_grey_images_stay_grey_at_another_size() -> None:
    model = timm.create_model("mixer_nano_patch4_32", in_chans=1, num_blocks=1)
    model.pretrained_cfg["input_size"] = (1, 32, 32)
    model.set_input_size((40, 48))
    assert model.pretrained_cfg["input_size"] == (1, 40, 48)


def test_odd_maps_are_halved_upwards_at_another_size_too() -> None:
    stages = {"depths": (1, 1), "embed_dims": (10, 12), "segments": (5, 3), "downsample_after": (1,)}
    model = VisionPermutator(img_size=35, num_classes=2, **stages).eval()
    model.set_input_size(49)
    assert model(torch.randn(1, 3, 49, 49)).shape == (1, 2)


SHARED = {
    "gmlp_nano_patch4_32": "sgu.weight",
    "mixer_nano_patch4_32": "mlp_tokens.fc1.weight",
    "resmlp_nano_patch4_32": "linear_tokens.weight",
    "vip_nano_patch4_32": "attn.mlp_h.weight",
}


@pytest.mark.parametrize("depth", [0, 1, 2], ids=["block", "layer", "parameter"])
@pytest.mark.parametrize("name", SHARED)
def test_what_blocks_share_they_share_at_another_size(name, depth) -> None:
    """The whole block, the layer that holds a weight for positions, or the weight alone."""
    model = random_model(name)
    owner, _, weight = SHARED[name].rpartition(".")
    first, last = model.blocks[-2], model.blocks[-1]
    if depth == 0:
        model.blocks[-1] = first
    elif depth == 1:
        parent, _, layer = owner.rpartition(".")
        setattr(last.get_submodule(parent), layer, first.get_submodule(owner))
    else:
        setattr(last.get_submodule(owner), weight, getattr(first.get_submodule(owner), weight))
    apart = shallow_model(name, img_size=(48, 64))
    apart.load_state_dict(model.state_dict())
    model.set_input_size((48, 64))
    assert model.get_parameter(f"blocks.{len(model.blocks) - 1}.{SHARED[name]}") is first.get_parameter(SHARED[name])
    images = torch.randn(1, 3, 48, 64)
    torch.testing.assert_close(model(images), apart(images), rtol=0, atol=0)


def test_a_patch_embedding_with_weight_norm_stays_as_it_was() -> None:
    model = shallow_model("gmlp_nano_patch4_32")
    weight_norm(model.stem.proj)
    x = torch.randn(1, 3, 32, 32)
    expected = model(x)
    with pytest.raises(ValueError, match="its proj has no weight of its own"):
        model.set_input_size(48, patch_kernel=6)
    assert (model.stem.grid_size, model.stem.img_size) == ((8, 8), (32, 32))
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
