"""Whether weights fit a model."""

import pytest
import torch
from torch import nn

from allmlp.checkpoints.fitting import load_weights, widest
from allmlp.errors import UserError


def test_the_widest_dtype_holds_all() -> None:
    half, single, double = (torch.zeros(1, dtype=dtype) for dtype in (torch.float16, torch.float32, torch.float64))
    assert widest({"a": half}) == widest({"a": half, "b": single}) == torch.float32
    assert widest({"a": half, "b": double}) == torch.float64


def test_what_does_not_fit_is_listed_and_nothing_of_it_loaded() -> None:
    model = nn.Linear(2, 3)
    before = model.bias.detach().clone()
    state = {"weight": torch.zeros(3, 4), "bias": torch.zeros(3), "scale": torch.zeros(())}
    with pytest.raises(UserError) as refusal:
        load_weights(model, state, "old.pt")
    assert str(refusal.value).splitlines() == [
        "The weights of old.pt do not match the model.",
        "  1 unexpected: scale",
        "  1 of another shape: weight [3, 4] instead of [3, 2]",
    ]
    assert torch.equal(model.bias, before)
