import pytest
import torch
from torch import Tensor, nn

from allmlp.layers import TokenLinear
from allmlp.layers.recomputing import mapped

LAYERS = {"channels": (nn.Linear(6, 8), (2, 5, 6)), "tokens": (TokenLinear(5, 7), (2, 5, 6))}


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every tensor that a GELU was written over."""
    found: list[Tensor] = []
    gelu_ = torch.ops.aten.gelu_

    def recorded(x: Tensor, **options: str) -> Tensor:
        found.append(x)
        return gelu_(x, **options)

    monkeypatch.setattr(torch.ops.aten, "gelu_", recorded)
    return found


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("kind", LAYERS)
def test_in_inference_the_activation_takes_over_the_memory(kind: str, approximate: str, written: list) -> None:
    linear, shape = LAYERS[kind]
    x, act = torch.randn(shape), nn.GELU(approximate)
    given = x.clone()
    with torch.no_grad():
        y = mapped(linear, x, act)
        assert torch.equal(y, act(linear(x)))
    assert len(written) == 1
    assert written[0] is y
    assert torch.equal(x, given)


class _Adapter(nn.Linear):
    """A layer that goes on reading what it has put out."""


def _hooked(linear: nn.Module, act: nn.Module) -> None:
    linear.register_forward_hook(lambda *_: None)


def _act_hooked(linear: nn.Module, act: nn.Module) -> None:
    act.register_forward_pre_hook(lambda *_: None)


@pytest.mark.parametrize("watch", [_hooked, _act_hooked])
def test_what_somebody_watches_is_left_alone(watch, written: list) -> None:
    linear, act, x = nn.Linear(6, 8), nn.GELU(), torch.randn(3, 6)
    watch(linear, act)
    with torch.no_grad():
        assert torch.equal(mapped(linear, x, act), act(linear(x)))
    assert not written


@pytest.mark.parametrize(
    ("linear", "act"),
    [(_Adapter(6, 8), nn.GELU()), (nn.Identity(), nn.GELU()), (nn.Linear(6, 8), nn.ReLU())],
    ids=["adapter", "identity", "another-activation"],
)
def test_other_layers_keep_their_output(linear: nn.Module, act: nn.Module, written: list) -> None:
    x = torch.randn(3, 6)
    given = x.clone()
    with torch.no_grad():
        assert torch.equal(mapped(linear, x, act), act(linear(x)))
    assert torch.equal(x, given)
    assert not written


def test_gradients_and_transforms_get_the_plain_form(written: list) -> None:
    linear, act, x = nn.Linear(6, 8), nn.GELU(), torch.randn(3, 6)
    mapped(linear, x, act).sum().backward()
    assert linear.weight.grad is not None
    with torch.no_grad():
        assert torch.equal(torch.func.vmap(lambda row: mapped(linear, row, act))(x), act(linear(x)))
    assert not written
