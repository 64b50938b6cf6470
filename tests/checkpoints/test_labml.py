import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from allmlp.checkpoints.conversion import convert_state_dict
from allmlp.errors import UserError
from allmlp.language import GMLPForCausalLM, GMLPForMaskedLM
from tests.checkpoints import originals
from tests.checkpoints.parity import VARIED, assert_equal_outputs


@VARIED
@given(
    dim=st.sampled_from([4, 6, 10]),
    hidden=st.sampled_from([2, 8, 14]),
    depth=st.integers(1, 3),
    seq_len=st.integers(2, 12),
    length=st.integers(1, 12),
    positions=st.booleans(),
)
def test_parity(seq_len: int, length: int, **sizes) -> None:
    found = assert_equal_outputs(originals.labml(seq_len=seq_len, length=min(seq_len, length), **sizes))
    assert isinstance(found.model, GMLPForCausalLM)


def test_learnt_positions_are_refused_by_name() -> None:
    weights = originals.labml().model.state_dict()
    weights["src_embed.positional_encodings"] = torch.randn(5000, 1, 8)
    with pytest.raises(UserError, match=r"'src_embed\.positional_encodings' are learnt"):
        convert_state_dict(weights)


def test_the_table_of_positions_is_reported() -> None:
    found = convert_state_dict(originals.labml().model.state_dict())
    assert found.notes == (
        "causal is not stored; true is assumed.",
        "'src_embed.positional_encodings' is the table of sinusoids, which the model computes.",
    )


def test_use_in_both_directions_may_be_given() -> None:
    weights = originals.labml().model.state_dict()
    assert isinstance(convert_state_dict(weights, facts={"causal": False}).model, GMLPForMaskedLM)
