import pytest
import torch

from allmlp.checkpoints.conversion import convert_state_dict
from allmlp.errors import UserError
from allmlp.language import GMLPModel
from tests.checkpoints import parity
from tests.checkpoints.parity import GOLDEN


def test_its_width_is_the_one_after_the_split() -> None:
    image = parity.golden(GOLDEN / "jaketae_image").convert()
    assert image.model.blocks[0].proj_in.out_features == 2 * 40
    assert isinstance(image.model.norm, torch.nn.Identity)
    language = parity.golden(GOLDEN / "jaketae_hidden_states").convert()
    assert language.model.config.intermediate_size == 2 * 12


def test_its_language_model_has_no_head() -> None:
    model = parity.golden(GOLDEN / "jaketae_hidden_states").convert().model
    assert isinstance(model, GMLPModel)
    assert isinstance(model.norm, torch.nn.Identity)
    assert not model.config.is_decoder


def test_blocks_alone_are_no_model() -> None:
    weights = torch.load(GOLDEN / "jaketae_image" / "checkpoint.pth")
    blocks = {name: tensor for name, tensor in weights.items() if name.startswith("model.")}
    with pytest.raises(UserError, match="No known project saves weights of these names"):
        convert_state_dict(blocks)
