"""Models of timm by their names."""

import pytest

from allmlp.checkpoints.timm_models import create_model
from allmlp.errors import UserError


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("gmlp_nano_patch4_23", {}, "There is no model 'gmlp_nano_patch4_23'. Did you mean 'gmlp_nano_patch4_32'"),
        ("gmlp_nano_patch4_32", {"num_block": 2}, "it has no argument 'num_block'. Did you mean 'num_blocks'?"),
        ("resnet18", {"block_argz": {}}, "it has no argument 'block_argz'. Did you mean 'block_args'?"),
        ("gmlp_nano_patch4_32", {"variant": "vip"}, "variant is what its name stands for"),
    ],
)
def test_a_slip_is_told_with_what_may_have_been_meant(name: str, arguments: dict, says: str) -> None:
    with pytest.raises(UserError) as refusal:
        create_model(name, arguments)
    assert says in str(refusal.value)
