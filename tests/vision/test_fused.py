"""Every family's network with its fused operators, which its layers take by themselves."""

import pytest
import torch

from tests.fused import assert_fused_matches
from tests.vision.nano import shallow_model

SPLIT_ATTENTION = {"pool_branches", "weigh_branches", "weigh_branches_backward"}
SHIFTED_LINEAR = {"shifted_linear", "shifted_linear_weight_grad", "shift_adjoint"}
OPERATORS = {
    "asmlp_nano_patch2_32": SHIFTED_LINEAR,
    "gmlp_nano_patch4_32": {
        "token_statistics",
        "gated_product",
        "gated_product_backward_read",
        "gated_product_backward_weight",
    },
    "s2mlp_nano_patch4_32": SHIFTED_LINEAR,
    "s2mlpv2_nano_patch2_32": SPLIT_ATTENTION,
    "vip_nano_patch4_32": SPLIT_ATTENTION | {"permute_linear", "permute_linear_weight_grad"},
}


@pytest.mark.parametrize(("name", "operators"), OPERATORS.items(), ids=OPERATORS.keys())
def test_output_and_gradients_are_those_of_torchs_form(name, operators) -> None:
    model = shallow_model(name, num_classes=5)
    image = torch.randn(2, 3, 32, 32)
    assert_fused_matches(model, lambda: model(image), operators)
