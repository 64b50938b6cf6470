import json

import pytest
import timm

from allmlp.checkpoints.architecture import VisionArchitecture, pair, ratio, vision_architecture
from allmlp.vision import ASMLP, GMLP, VisionPermutator, asmlp, gmlp, vip

SMALL = {**gmlp.VARIANTS["gmlp_small_patch16_224"]}
SMALL.pop("drop_path_rate")


def named(**changes: object) -> VisionArchitecture:
    sizes = {"num_classes": 1000, "img_size": (224, 224), "in_chans": 3}
    return vision_architecture(GMLP, gmlp.VARIANTS, **{**sizes, **SMALL, **changes})  # type: ignore[arg-type]


def test_a_named_size_needs_no_arguments() -> None:
    assert named() == VisionArchitecture(name="gmlp_small_patch16_224", num_classes=1000)
    assert named(patch_size=(16, 16), mlp_ratio=6.0).model_args == {}


def test_image_size_and_channels_are_spelt_out_where_they_differ() -> None:
    assert named(img_size=(256, 256)).model_args == {"img_size": 256}
    assert named(img_size=(224, 256)).model_args == {"img_size": [224, 256]}
    grey = named(in_chans=1)
    assert grey.model_args == {"in_chans": 1}
    assert grey.build().pretrained_cfg["input_size"] == (1, 224, 224)


def test_another_structure_is_spelt_out_whole() -> None:
    found = named(num_blocks=2, embed_dim=16)
    assert found.name in gmlp.VARIANTS
    model = found.build()
    assert len(model.blocks) == 2
    assert model.num_features == 16
    # Whatever becomes of the variant, the arguments say it all.
    other = timm.create_model("gmlp_base_patch16_224", num_classes=1000, **found.model_args)
    assert {n: t.shape for n, t in other.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}


def test_what_a_variant_has_more_is_a_difference() -> None:
    assert named(attention_size=64).name == "amlp_small_patch16_224"
    assert named().name == "gmlp_small_patch16_224"


@pytest.mark.parametrize(
    ("model_class", "variants"), [(ASMLP, asmlp.VARIANTS), (VisionPermutator, vip.VARIANTS)], ids=["AS-MLP", "ViP"]
)
def test_arguments_survive_json(model_class, variants) -> None:
    name, arguments = next(iter(variants.items()))
    arguments = {**{key: value for key, value in arguments.items() if key != "drop_path_rate"}, "mlp_ratio": 2}
    found = vision_architecture(model_class, variants, num_classes=3, img_size=224, in_chans=3, **arguments)
    assert json.loads(json.dumps(found.model_args)) == found.model_args
    assert found.name == name


def test_a_pair_may_be_one_number() -> None:
    assert pair(7) == pair([7, 7]) == pair((7, 7)) == (7, 7)


def test_a_ratio_gives_its_hidden_width_back() -> None:
    pairs = [(width, hidden) for width in range(1, 200) for hidden in range(1, 4 * width)]
    assert [(width, hidden) for width, hidden in pairs if int(width * ratio(hidden, width)) != hidden] == []
