import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from allmlp.checkpoints import MissingFacts
from allmlp.checkpoints.conversion import convert_state_dict
from allmlp.errors import UserError
from allmlp.language import GMLPForCausalLM, GMLPForMaskedLM, GMLPModel
from tests.checkpoints import originals, parity
from tests.checkpoints.parity import GOLDEN, VARIED, assert_equal_outputs

ACTIVATIONS = st.sampled_from([nn.Identity, nn.Tanh, nn.Sigmoid, nn.SiLU])
TOKENS = {
    "heads": st.sampled_from([1, 2, 4]),
    "attn_dim": st.none() | st.integers(1, 6),
    "depth": st.integers(1, 3),
    "ff_mult": st.sampled_from([2, 4]),
}


class TestParity:
    @VARIED
    @given(
        dim=st.sampled_from([4, 8, 12]),
        seq_len=st.integers(1, 12),
        length=st.integers(1, 12),
        shift=st.sampled_from([0, 1, 3]),
        toeplitz=st.booleans(),
        act=ACTIVATIONS,
        **TOKENS,
    )
    def test_causal(self, dim, seq_len, length, shift, toeplitz, act, **sizes) -> None:
        # Upstream cannot shift further than the input is long.
        assume(shift <= min(seq_len, length))
        if act is not nn.Identity:
            sizes["act"] = act()
        original = originals.lucidrains_language(
            causal=True,
            dim=dim,
            seq_len=seq_len,
            length=min(seq_len, length),
            shift_tokens=shift,
            circulant_matrix=toeplitz,
            **sizes,
        )
        found = assert_equal_outputs(original)
        assert isinstance(found.model, GMLPForCausalLM)

    @VARIED
    @given(
        dim=st.sampled_from([8, 12]),
        seq_len=st.integers(2, 12),
        shift=st.sampled_from([0, 1, 2]),
        toeplitz=st.booleans(),
        **TOKENS,
    )
    def test_both_directions(self, dim, seq_len, shift, toeplitz, **sizes) -> None:
        original = originals.lucidrains_language(
            dim=dim, seq_len=seq_len, shift_tokens=shift, circulant_matrix=toeplitz, **sizes
        )
        found = assert_equal_outputs(original)
        assert isinstance(found.model, GMLPForMaskedLM)

    @VARIED
    @given(
        grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
        patch=st.tuples(st.integers(1, 3), st.integers(1, 3)),
        channels=st.sampled_from([1, 3]),
        dim=st.sampled_from([4, 8]),
        **TOKENS,
    )
    def test_images(self, **sizes) -> None:
        assert_equal_outputs(originals.lucidrains_image(**sizes))


def test_a_file_of_the_autoregressive_wrapper_is_unwrapped() -> None:
    from g_mlp_pytorch import gMLP
    from g_mlp_pytorch.autoregressive_wrapper import AutoregressiveWrapper

    wrapper = AutoregressiveWrapper(gMLP(num_tokens=7, dim=8, depth=1, seq_len=5, causal=True))
    found = convert_state_dict(wrapper.state_dict(), facts={"causal": True, "gate_act": None})
    x = torch.randint(7, (2, 4))
    torch.testing.assert_close(found.model(x).logits, wrapper.net(x))


class TestVersions:
    """What a version can vary has to be given, what it cannot has not."""

    @pytest.mark.parametrize(
        ("name", "missing"),
        [
            ("lucidrains_causal_lm", ("causal", "gate_act")),
            ("lucidrains_0_1_4_toeplitz_lm", ("causal", "gate_act")),
            ("lucidrains_0_0_18_causal_lm", ("causal", "gate_act")),
            ("lucidrains_0_0_15_causal_lm", ("causal", "gate_act")),
            ("lucidrains_0_0_8_causal_lm", ("causal",)),
        ],
    )
    def test_each_asks_for_its_own(self, name: str, missing: tuple[str, ...]) -> None:
        with pytest.raises(MissingFacts) as caught:
            convert_state_dict(torch.load(GOLDEN / name / "checkpoint.pth"))
        assert caught.value.names == missing

    def test_the_first_ones_ask_for_nothing(self) -> None:
        found = parity.golden(GOLDEN / "lucidrains_0_0_4_hidden_states").convert()
        assert isinstance(found.model, GMLPModel)
        assert not found.model.config.is_decoder

    def test_a_convolution_that_was_saved_and_not_used_is_left_out_and_that_is_said(self) -> None:
        found = parity.golden(GOLDEN / "lucidrains_0_1_1_masked_lm").convert()
        assert any("'sgu.proj' is left out" in note for note in found.notes)
        weights = originals.lucidrains_image().model.state_dict()
        unused = {
            "layers.0.fn.fn.sgu.proj.weight": torch.zeros(9, 9, 1),
            "layers.0.fn.fn.sgu.proj.bias": torch.zeros(9),
        }
        assert any("'sgu.proj' is left out" in note for note in convert_state_dict({**weights, **unused}).notes)

    @pytest.mark.parametrize(
        "layer", ["layers.0.fn.3.attn", "layers.0.fn.fn.2.attn", "1.fn.3.attn"], ids=["0.0.5", "0.0.11", "0.0.3"]
    )
    def test_the_early_tiny_attention_is_refused_by_name(self, layer: str) -> None:
        name = {"layers.0.fn.3.attn": "0_0_8_causal_lm", "layers.0.fn.fn.2.attn": "0_0_15_causal_lm"}.get(
            layer, "0_0_4_hidden_states"
        )
        weights = torch.load(GOLDEN / f"lucidrains_{name}" / "checkpoint.pth")
        weights |= {f"{layer}.to_qkv.weight": torch.zeros(12, 64), f"{layer}.to_out.weight": torch.zeros(32, 4)}
        with pytest.raises(UserError, match=r"tiny attention of g-mlp-pytorch before 0\.0\.16"):
            convert_state_dict(weights, facts={"causal": True, "gate_act": None})


def test_toeplitz_factors_are_multiplied_out_exactly() -> None:
    found = parity.golden(GOLDEN / "lucidrains_0_1_4_toeplitz_lm").convert()
    weight = found.model.model.layers[0].sgu.weight
    assert weight.dtype == torch.float64
    assert weight.shape == (2, 12, 12)
    assert torch.equal(weight, weight.tril())
    assert any("float64" in note for note in found.notes)


def test_toeplitz_factors_have_to_fit() -> None:
    weights = torch.load(GOLDEN / "lucidrains_0_1_4_toeplitz_lm" / "checkpoint.pth")
    name = "layers.0.fn.fn.sgu.circulant_pos_x"
    with pytest.raises(UserError, match=r"circulant_pos_x' has shape \[2, 11\], its bias \[2, 12\]"):
        convert_state_dict({**weights, name: weights[name][:, 1:]}, facts={"causal": True, "gate_act": None})
    del weights[name]
    with pytest.raises(UserError, match="one is missing"):
        convert_state_dict(weights, facts={"causal": True, "gate_act": None})


def test_a_model_without_embedding_is_refused_by_name() -> None:
    from g_mlp_pytorch import gMLP

    weights = gMLP(dim=8, depth=1, seq_len=5).state_dict()
    with pytest.raises(UserError, match="without num_tokens: it has no embedding"):
        convert_state_dict(weights, facts={"causal": True, "gate_act": None})


class TestPatches:
    @pytest.mark.parametrize("make", [originals.lucidrains_image, originals.lucidrains_mixer])
    def test_what_the_shapes_leave_open_is_said(self, make) -> None:
        weights = make(patch=2, channels=12) if make is originals.lucidrains_mixer else make(channels=12, patch=(2, 2))
        weights = weights.model.state_dict()
        assert convert_state_dict(weights).notes == (
            "img_size is not stored; 12×12 pixels is assumed.",
            "patch_size is not stored; 4×4 pixels is assumed.",
            "in_chans is not stored; 3 is assumed.",
        )
        found = convert_state_dict(weights, facts={"in_chans": 12, "patch_size": 2, "img_size": [2, 18]})
        assert found.notes == ()
        assert found.model.stem.grid_size == (1, 9)

    def test_channels_that_are_not_three_have_to_be_given(self) -> None:
        weights = originals.lucidrains_image(channels=5).model.state_dict()
        with pytest.raises(UserError, match="A patch has 20 numbers, not 2×2 pixels of 3 channels: give in_chans="):
            convert_state_dict(weights)
        model = convert_state_dict(weights, facts={"in_chans": 5}).model
        assert model.pretrained_cfg["input_size"] == (5, 6, 6)
        assert len(model.pretrained_cfg["mean"]) == 5

    def test_a_patch_that_is_not_square_has_to_be_given(self) -> None:
        weights = originals.lucidrains_image(patch=(1, 3)).model.state_dict()
        with pytest.raises(UserError, match="A patch has 9 numbers"):
            convert_state_dict(weights)
        model = convert_state_dict(weights, facts={"patch_size": [1, 3]}).model
        assert model.stem.patch_size == (1, 3)
