import numpy as np
import pytest
import torch

from allmlp.checkpoints.conversion import convert_state_dict
from allmlp.errors import UserError
from tests.checkpoints.parity import GOLDEN


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / "google_mixer" / "checkpoint.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def test_it_computes_the_approximate_gelu_and_is_prepared_for(weights: dict[str, torch.Tensor]) -> None:
    found = convert_state_dict(weights)
    assert found.model.blocks[0].mlp_tokens.act.approximate == "tanh"
    assert found.model.blocks[0].mlp_channels.act.approximate == "tanh"
    assert found.model.blocks[0].norm1.eps == 1e-6
    assert found.model.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("prefix", ["params/", "Mixer/", "opt/target/"])
@pytest.mark.parametrize("block", ["MixerBlock", "encoderblock"])
def test_names_of_other_releases(weights: dict[str, torch.Tensor], prefix: str, block: str) -> None:
    renamed = {prefix + name.replace("MixerBlock", block): tensor for name, tensor in weights.items()}
    expected = convert_state_dict(weights).model.state_dict()
    actual = convert_state_dict(renamed).model.state_dict()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_a_head_may_be_missing(weights: dict[str, torch.Tensor]) -> None:
    model = convert_state_dict({name: weights[name] for name in weights if not name.startswith("head/")}).model
    assert model.num_classes == 0


def test_names_of_the_unreleased_first_version_are_refused(weights: dict[str, torch.Tensor]) -> None:
    weights["MixerBlock_0/kernel16"] = torch.zeros(16, 6)
    with pytest.raises(UserError, match=r"1 not used by the architecture: block\.0\.kernel16"):
        convert_state_dict(weights)
