import numpy as np
import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn

from tests.vision.nano import NANO, ONE_SIZE

FAMILIES = {
    "gmlp": ["gmlp_base_patch16_224", "gmlp_nano_patch4_32", "gmlp_small_patch16_224", "gmlp_tiny_patch16_224"],
    "amlp": ["amlp_small_patch16_224"],
    "mixer": [
        "mixer_base_patch16_224",
        "mixer_base_patch32_224",
        "mixer_huge_patch14_224",
        "mixer_large_patch16_224",
        "mixer_large_patch32_224",
        "mixer_nano_patch4_32",
        "mixer_small_patch16_224",
        "mixer_small_patch32_224",
    ],
    "resmlp": ["resmlp_12_patch16_224", "resmlp_24_patch16_224", "resmlp_36_patch16_224", "resmlp_nano_patch4_32"],
    "s2mlp": ["s2mlp_deep_patch16_224", "s2mlp_nano_patch4_32", "s2mlp_wide_patch16_224"],
    "s2mlpv2": ["s2mlpv2_medium_patch7_224", "s2mlpv2_nano_patch2_32", "s2mlpv2_small_patch7_224"],
    "asmlp": [
        "asmlp_base_patch4_224",
        "asmlp_mobile_patch4_224",
        "asmlp_nano_patch2_32",
        "asmlp_small_patch4_224",
        "asmlp_tiny_patch4_224",
    ],
    "vip": [
        "vip_large_patch7_224",
        "vip_medium_patch7_224",
        "vip_nano_patch4_32",
        "vip_small_patch7_224",
        "vip_small_patch14_224",
    ],
}
EVERY = [name for names in FAMILIES.values() for name in names]


@pytest.mark.parametrize("family", FAMILIES)
def test_timm_lists_the_family(family) -> None:
    assert timm.list_models(f"{family}_*_patch*") == FAMILIES[family]


def test_timm_keeps_its_own_models() -> None:
    assert timm.model_entrypoint("gmlp_s16_224").__module__ == "timm.models.mlp_mixer"
    assert type(timm.create_model("resmlp_12_224", num_classes=0)).__module__ == "timm.models.mlp_mixer"


@pytest.mark.parametrize("name", EVERY)
def test_configuration_says_how_images_are_prepared(name) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    cfg = model.pretrained_cfg
    size = 32 if "nano" in name else 224
    assert cfg["architecture"] == name
    assert cfg["input_size"] == (3, size, size)
    assert cfg["num_classes"] == model.num_classes == (10 if size == 32 else 1000)
    assert (cfg["mean"], cfg["std"]) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    # 32-pixel images are taken whole; evaluation at 224 crops 224 of 256 pixels, Vision Permutator of 248.
    expected = 1.0 if size == 32 else 0.9 if name.startswith("vip") and "large" not in name else 0.875
    assert cfg["crop_pct"] == expected
    assert cfg["fixed_input_size"] == (not name.startswith(("asmlp", "s2mlp")))
    parameters = dict(model.named_parameters())
    assert parameters[f"{cfg['first_conv']}.weight"].shape[1] == 3
    assert parameters[f"{cfg['classifier']}.weight"].shape[0] == cfg["num_classes"]
    assert model.forward_features(torch.empty(1, *cfg["input_size"], device="meta")).shape[1:3] == cfg["pool_size"]
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    assert transform.transforms[-1].std.tolist() == pytest.approx(cfg["std"])


@pytest.mark.parametrize("name", NANO)
def test_image_size_reaches_what_prepares_the_images(name) -> None:
    model = timm.create_model(name, img_size=(16, 24))
    assert timm.data.resolve_data_config(model=model)["input_size"] == (3, 16, 24)
    assert model(torch.randn(1, 3, 16, 24)).shape == (1, 10)


@pytest.mark.parametrize("name", NANO)
def test_every_argument_of_create_model(name) -> None:
    model = timm.create_model(
        name,
        num_classes=7,
        in_chans=2,
        img_size=32,
        patch_size=(4, 2),
        drop_rate=0.1,
        proj_drop_rate=0.2,
        drop_path_rate=0.3,
        global_pool="",
    )
    rates = {module.p for module in model.modules() if isinstance(module, nn.Dropout)}
    assert rates == {0.1, 0.2}
    assert model.head_drop.p == 0.1
    paths = [block.drop_path.drop_prob for block in model.blocks if hasattr(block, "drop_path")]
    assert paths == pytest.approx(torch.linspace(0, 0.3, len(paths)).tolist())
    assert model.num_classes == 7
    out = model(torch.randn(2, 2, 32, 32))
    assert out.shape[0] == 2
    assert out.shape[-1] == 7
    # A patch twice as high as wide gives a map twice as wide as high.
    assert out.ndim == 4
    assert out.shape[2] == 2 * out.shape[1]


@pytest.mark.parametrize("features", [{}, {"features_only": True, "pyramid_channels": 8}], ids=str)
@pytest.mark.parametrize("name", NANO)
def test_models_are_made_where_and_as_asked(name, features) -> None:
    """The arguments with which timm's own models are made on a device, in a dtype."""
    made = timm.create_model(name, device="meta", dtype=torch.bfloat16, **features)
    assert {(tensor.device.type, tensor.dtype) for tensor in made.parameters()} == {("meta", torch.bfloat16)}
    model = timm.create_model(name, dtype=torch.float64, **features)
    out = model(torch.randn(1, 3, 32, 32, dtype=torch.float64))
    assert {y.dtype for y in (out if features else [out])} == {torch.float64}


@pytest.mark.parametrize("name", NANO)
def test_overlaid_configuration_wins(name) -> None:
    model = timm.create_model(name, img_size=16, pretrained_cfg_overlay={"mean": (0.5,) * 3, "input_size": (3, 8, 8)})
    assert model.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    assert model.pretrained_cfg["input_size"] == (3, 8, 8)


@pytest.mark.parametrize("name", NANO)
def test_checkpoint_of_another_head_and_other_channels_loads(name, tmp_path) -> None:
    """timm's own fine-tuning path: `pretrained_cfg_overlay` with a file, another class count, grey images."""
    trained = timm.create_model(name)
    torch.save(trained.state_dict(), tmp_path / "weights.pth")
    model = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "weights.pth")}, num_classes=3, in_chans=1
    )
    assert model.head.weight.shape[0] == 3
    torch.testing.assert_close(model.stem.proj.weight, trained.stem.proj.weight.sum(1, keepdim=True))
    last = f"blocks.{len(trained.blocks) - 1}."
    for key, value in trained.state_dict().items():
        if key.startswith(last):
            torch.testing.assert_close(model.state_dict()[key], value, rtol=0, atol=0)


@pytest.mark.parametrize("name", ONE_SIZE)
def test_size_that_no_patch_grid_fits_is_refused(name) -> None:
    with pytest.raises(ValueError, match=r"30×30 pixels .* patches of 4×4.*nearest sizes are 28×28 and 32×32"):
        timm.create_model(name, img_size=30)


@pytest.mark.parametrize(
    ("name", "argument", "value", "allowed"),
    [
        ("gmlp_nano_patch4_32", "num_blocks", 0, "a whole number from 1 on"),
        ("gmlp_nano_patch4_32", "embed_dim", "wide", "a whole number from 1 on"),
        ("gmlp_nano_patch4_32", "attention_size", -1, "a whole number from 0 on"),
        ("s2mlp_nano_patch4_32", "patch_size", 0, r"a number of pixels from 1 on, or \(height, width\)"),
        ("s2mlp_nano_patch4_32", "img_size", [32, 32, 3], r"a number of pixels from 1 on, or \(height, width\)"),
        ("asmlp_nano_patch2_32", "depths", (2, 0), "whole numbers from 1 on"),
        ("asmlp_nano_patch2_32", "depths", (), "whole numbers from 1 on"),
        ("vip_nano_patch4_32", "segments", (0,), "whole numbers from 1 on"),
        ("asmlp_nano_patch2_32", "depths", 2, "whole numbers"),
        ("vip_nano_patch4_32", "norm_eps", "1e-5", "a number from 0 on"),
        ("mixer_nano_patch4_32", "drop_path_rate", 1.5, "a number from 0 to 1"),
        ("resmlp_nano_patch4_32", "mlp_ratio", float("nan"), "a number from 0 on"),
    ],
)
def test_what_no_model_can_be_made_of_is_refused(name, argument, value, allowed) -> None:
    with pytest.raises(ValueError, match=f"{argument} must be {allowed}.*, got "):
        timm.create_model(name, **{argument: value})


def test_a_size_too_small_for_the_last_stage_is_refused() -> None:
    with pytest.raises(ValueError, match=r"8×8 pixels is too small .* at least 16×16"):
        timm.create_model("asmlp_tiny_patch4_224", img_size=8)
    first = timm.create_model("asmlp_tiny_patch4_224", img_size=8, features_only=True, out_indices=(0,))
    assert first(torch.randn(1, 3, 8, 8))[0].shape == (1, 96, 2, 2)


def test_sizes_may_be_numbers_of_numpy() -> None:
    model = timm.create_model("gmlp_nano_patch4_32", img_size=np.int64(16), patch_size=[np.int32(8), 4])
    assert model.stem.grid_size == (2, 4)


def test_weights_that_do_not_exist_are_refused() -> None:
    with pytest.raises(RuntimeError, match="No pretrained weights exist for vip_nano_patch4_32"):
        timm.create_model("vip_nano_patch4_32", pretrained=True)


@pytest.mark.parametrize("name", NANO)
def test_rates_reach_every_block(name: str) -> None:
    model = timm.create_model(name, proj_drop_rate=0.25, drop_path_rate=0.5)
    paths = [module.drop_prob for module in model.blocks.modules() if isinstance(module, DropPath)]
    assert paths == pytest.approx(np.linspace(0, 0.5, len(paths)).tolist())
    blocks = [block for block in model.blocks if hasattr(block, "drop_path")]
    drops = {module.p for block in blocks for module in block.modules() if isinstance(module, nn.Dropout)}
    assert drops == {0.25}


@pytest.mark.parametrize("name", [name for name in NANO if not name.startswith(("asmlp", "resmlp"))])
def test_the_norms_epsilon_reaches_every_norm(name: str) -> None:
    model = timm.create_model(name, norm_eps=0.125)
    # The gate's norm has one of its own.
    norms = [m for key, m in model.named_modules() if isinstance(m, nn.LayerNorm) and not key.endswith("sgu.norm")]
    assert {norm.eps for norm in norms} == {0.125}
