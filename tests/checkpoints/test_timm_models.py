"""Models of timm by their names."""

import pytest

from allmlp.checkpoints.timm_models import create_model
from allmlp.errors import UserError


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("gmlp_nano_patch4_23", {}, "There is no model 'gmlp_nano_patch4_23'. Did you mean 'gmlp_nano_patch4_32'"),
        # A model of timm's: the classes here are wrapped by the tests' type checks.
        ("mixer_b16_224", {"act_later": "gelu"}, "it has no argument 'act_later'. Did you mean 'act_layer'"),
        ("resmlp_12_224", {"zzz": 1}, "cannot be made with these arguments: it has no argument 'zzz'"),
    ],
)
def test_a_slip_is_told_with_what_may_have_been_meant(name: str, arguments: dict, says: str) -> None:
    with pytest.raises(UserError) as refusal:
        create_model(name, arguments)
    assert says in str(refusal.value)
