import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import GluMlp
from timm.models.mlp_mixer import MlpMixer
from torch import nn

import allmlp
from allmlp.checkpoints import export_state_dict
from allmlp.checkpoints.architecture import VisionArchitecture
from allmlp.checkpoints.conversion import LAYOUTS, convert_state_dict, write_run_directory
from allmlp.errors import UserError
from allmlp.vision import GMLP, Mixer, ResMLP
from tests.checkpoints import originals
from tests.checkpoints.parity import VARIED, assert_equal_outputs
from tests.tolerances import PARITY

GRIDS = st.tuples(st.integers(1, 4), st.integers(1, 4))
SIZES = {
    "grid": GRIDS,
    "patch": st.integers(1, 3),
    "dim": st.integers(2, 24),
    "depth": st.integers(1, 3),
    "classes": st.integers(1, 5),
}


class TestParity:
    @VARIED
    @given(ratio=st.sampled_from([2, 4, 6]), **SIZES)
    def test_gmlp(self, **sizes: object) -> None:
        assert_equal_outputs(originals.timm_gmlp(**sizes))

    @VARIED
    @given(ratio=st.tuples(st.sampled_from([0.5, 1, 2.5]), st.sampled_from([1, 4])), **SIZES)
    def test_mixer(self, **sizes: object) -> None:
        assert_equal_outputs(originals.timm_mixer(**sizes))

    @VARIED
    @given(ratio=st.sampled_from([1, 3, 4]), **SIZES)
    def test_resmlp(self, **sizes: object) -> None:
        assert_equal_outputs(originals.timm_resmlp(**sizes))


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("gmlp_s16_224", "gmlp_small_patch16_224"),
        ("mixer_b32_224", "mixer_base_patch32_224"),
        ("resmlp_24_224", "resmlp_24_patch16_224"),
    ],
)
def test_a_published_size_goes_by_its_name(theirs: str, ours: str) -> None:
    with torch.device("meta"):
        weights = timm.create_model(theirs, num_classes=7).state_dict()
    layout = next(layout for layout in LAYOUTS if layout.recognises(weights))
    architecture, _ = layout.convert(weights, {})
    assert isinstance(architecture, VisionArchitecture)
    assert (architecture.name, architecture.num_classes, architecture.model_args) == (ours, 7, {})


def test_a_grid_that_is_not_square_has_to_be_given() -> None:
    weights = originals.timm_mixer(grid=(2, 3)).model.state_dict()
    with pytest.raises(UserError, match="6 tokens are no square grid of patches: give the image size, img_size="):
        convert_state_dict(weights)
    with pytest.raises(UserError, match="does not fit: the model has 6 tokens of 2×2 pixels"):
        convert_state_dict(weights, facts={"img_size": [4, 4]})
    assert convert_state_dict(weights, facts={"img_size": "4x6"}).model.stem.grid_size == (2, 3)


def test_a_square_number_of_tokens_may_be_another_grid() -> None:
    weights = originals.timm_mixer(grid=(4, 9), patch=2).model.state_dict()
    found = convert_state_dict(weights)
    assert found.model.stem.grid_size == (6, 6)
    assert "img_size is not stored; 12×12 pixels is assumed." in found.notes
    found = convert_state_dict(weights, facts={"img_size": [8, 18]})
    assert found.model.stem.grid_size == (4, 9)
    assert not [note for note in found.notes if "img_size" in note]


def test_gated_mixers_are_refused_by_name() -> None:
    weights = MlpMixer(img_size=8, patch_size=4, embed_dim=8, num_blocks=1, mlp_layer=GluMlp).state_dict()
    with pytest.raises(UserError, match="timm's gmixer"):
        convert_state_dict(weights)


def test_another_activation_may_be_given() -> None:
    model = Mixer(img_size=6, patch_size=2, num_blocks=2, embed_dim=8, act_layer="gelu_tanh").eval()
    originals.draw(model)
    x = torch.randn(2, 3, 6, 6)
    found = convert_state_dict(model.state_dict())
    assert "act_layer is not stored; gelu is assumed." in found.notes
    found = convert_state_dict(model.state_dict(), facts={"act_layer": "gelu_tanh"})
    assert not [note for note in found.notes if "act_layer" in note]
    torch.testing.assert_close(found.model(x), model(x), rtol=0, atol=0)
    for value in ("relu", ["gelu"]):
        with pytest.raises(UserError, match=r"act_layer is .*; it should be gelu or gelu_tanh"):
            convert_state_dict(model.state_dict(), facts={"act_layer": value})
    weights = originals.timm_resmlp().model.state_dict()
    with pytest.raises(UserError, match=r"it should be gelu, as the models here have no other"):
        convert_state_dict(weights, facts={"act_layer": "gelu_tanh"})


def test_a_norm_behind_the_stem_is_not_dropped() -> None:
    weights = MlpMixer(img_size=8, patch_size=4, embed_dim=8, num_blocks=1, stem_norm=True).state_dict()
    with pytest.raises(UserError, match=r"2 not used by the architecture: stem\.norm\.weight, stem\.norm\.bias"):
        convert_state_dict(weights)


class TestExport:
    @pytest.mark.parametrize(
        "original", [originals.timm_gmlp, originals.timm_mixer, originals.timm_resmlp], ids=["gMLP", "Mixer", "ResMLP"]
    )
    def test_the_way_back_ends_where_it_began(self, original) -> None:
        weights = original().model.state_dict()
        exported = export_state_dict(convert_state_dict(weights).model, "timm")
        assert exported.keys() == weights.keys()
        assert all(torch.equal(exported[name], weights[name]) for name in weights)

    @pytest.mark.parametrize(
        ("ours", "theirs", "sizes"),
        [
            ("gmlp_nano_patch4_32", originals.timm_gmlp, {"dim": 96, "ratio": 5}),
            ("mixer_nano_patch4_32", originals.timm_mixer, {"dim": 128, "ratio": (0.5, 2)}),
            ("resmlp_nano_patch4_32", originals.timm_resmlp, {"dim": 96}),
        ],
    )
    def test_timm_loads_ours_and_computes_the_same(self, ours: str, theirs, sizes: dict[str, object]) -> None:
        model = timm.create_model(ours).double().eval()
        originals.draw(model)
        peer = theirs(grid=(8, 8), patch=4, depth=8, classes=10, **sizes).model.double().eval()
        peer.load_state_dict(export_state_dict(model, "timm"))
        x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
        expected = model(x)
        assert (peer(x) - expected).abs().max() <= PARITY[torch.float64] * expected.abs().max()

    @pytest.mark.parametrize(
        ("model", "message"),
        [
            (GMLP(num_blocks=1, attention_size=4), "it has no tiny attention"),
            (GMLP(num_blocks=1, num_spatial_heads=2), "it has one spatial head"),
            (GMLP(num_blocks=1, final_norm=False), "it has a final norm"),
            (GMLP(num_blocks=1, norm_eps=1e-5), "its norms have epsilon 1e-6"),
            (Mixer(num_blocks=1, act_layer="gelu_tanh"), "its GELU is the exact one"),
            (Mixer(num_blocks=1, norm_eps=1e-5), "its norms have epsilon 1e-6"),
            (ResMLP(num_blocks=1, patch_kernel=20), "its patches do not overlap"),
        ],
    )
    def test_what_timm_computes_otherwise_is_refused(self, model: nn.Module, message: str) -> None:
        with pytest.raises(UserError, match=f"does not compute the same: {message}"):
            export_state_dict(model, "timm")

    def test_other_families_and_projects_are_refused(self) -> None:
        with pytest.raises(UserError, match="timm has no S2MLP; it has gMLP, Mixer and ResMLP"):
            export_state_dict(timm.create_model("s2mlp_nano_patch4_32"), "timm")
        with pytest.raises(UserError, match="no export to 'keras', only to timm"):
            export_state_dict(ResMLP(num_blocks=1), "keras")


def test_grey_images_have_one_mean(tmp_path) -> None:
    model = timm.create_model("gmlp_nano_patch4_32", num_classes=2, num_blocks=1, embed_dim=8, in_chans=1)
    write_run_directory(convert_state_dict(export_state_dict(model, "timm")), tmp_path)
    assert allmlp.load(tmp_path).pretrained_cfg["mean"] == [0.5]
