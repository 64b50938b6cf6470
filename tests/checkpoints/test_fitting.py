"""Whether weights fit a model."""

import pytest
import torch
from torch import nn

from allmlp.checkpoints.fitting import load_weights, widest, with_weights
from allmlp.errors import UserError


class Plain(nn.Module):
    """Made of its weights alone: a parameter, and a buffer that is saved."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(2, 3)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.map(x))


class Unsaved(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.full((3,), 2.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale


class Unregistered(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.full((3,), 2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale


class Tied(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(2, 3)
        self.again.weight = self.map.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.again(x)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [Plain, Unsaved, Unregistered, Tied])
def test_weights_are_drawn_only_for_a_model_of_more_than_its_weights(kind: type[Plain], dtype: torch.dtype) -> None:
    original = kind().to(dtype).eval()
    original.norm.running_mean.fill_(0.3)
    with torch.device("meta"):
        blank = kind()
    before = torch.get_rng_state()
    model = with_weights(blank, kind, original.state_dict(), "it").eval()
    assert torch.equal(torch.get_rng_state(), before) == (kind is Plain)
    x = torch.randn(4, 2, dtype=dtype)
    assert torch.equal(model(x), original(x))
    assert [(name, tensor.requires_grad) for name, tensor in model.named_parameters()] == [
        (name, tensor.requires_grad) for name, tensor in original.named_parameters()
    ]
    assert getattr(model, "again", model.map).weight is model.map.weight
