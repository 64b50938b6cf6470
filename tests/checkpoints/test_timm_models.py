"""Models of timm by their names."""

import pytest

from allmlp.checkpoints.timm_models import create_model
from allmlp.errors import UserError


# Python tells an unknown argument itself, where no check of the tests stands in front.
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("gmlp_nano_patch4_23", {}, "There is no model 'gmlp_nano_patch4_23'. Did you mean 'gmlp_nano_patch4_32'"),
        ("gmlp_nano_patch4_32", {"num_block": 2}, "it has no argument 'num_block'. Did you mean 'num_blocks'"),
        ("mixer_b16_224", {"act_later": "gelu"}, "it has no argument 'act_later'. Did you mean 'act_layer'"),
        ("resmlp_12_224", {"zzz": 1}, "cannot be made with these arguments: it has no argument 'zzz'"),
    ],
)
def test_a_slip_is_told_with_what_may_have_been_meant(name: str, arguments: dict, says: str) -> None:
    with pytest.raises(UserError) as refusal:
        create_model(name, arguments)
    assert says in str(refusal.value)
