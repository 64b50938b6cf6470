"""The channel MLP against its equation; what stands in a layer's place, and who watches it, is respected."""

import pytest
import torch
from timm.layers import Mlp
from torch import Tensor, nn

from allmlp.layers import ChannelMLP
from tests.layers import parity


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7), (2, 3, 4, 7)], ids=str)
def test_output_and_gradients(shape: tuple[int, ...]) -> None:
    layer = ChannelMLP(7, 13)
    parity.assert_matches(
        layer,
        lambda p, x: parity.linear(p, "fc2", parity.gelu(parity.linear(p, "fc1", x))),
        torch.randn(shape),
    )


def test_dropout_draws_as_timm_does() -> None:
    ours, theirs = ChannelMLP(6, 12, drop=0.5), Mlp(6, 12, drop=0.5)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 6)
    outs = []
    for layer in (ours, theirs):
        torch.manual_seed(1)
        outs.append(layer(x))
    assert torch.equal(*outs)


class _Adapter(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.more = base, nn.Linear(base.in_features, base.out_features)
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.more(x)


def test_a_layer_in_the_place_of_a_linear_one_is_called() -> None:
    layer = ChannelMLP(6, 12)
    layer.fc2 = _Adapter(layer.fc2)
    x = torch.randn(4, 6)
    layer(x).sum().backward()
    assert layer.fc2.more.weight.grad is not None
    torch.testing.assert_close(layer(x), layer.fc2(layer.act(layer.fc1(x))))


@pytest.mark.parametrize("watched", ["fc1", "act", "fc2", "drop2"])
def test_hooks_see_every_layer(watched: str) -> None:
    layer, seen = ChannelMLP(6, 12), []
    getattr(layer, watched).register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    out = layer(torch.randn(4, 6))
    assert len(seen) == 1
    if watched in ("fc2", "drop2"):
        assert torch.equal(seen[0], out)


def test_a_replaced_forward_is_called() -> None:
    # Offloading in accelerate puts a function in this place that brings the weights first.
    layer, calls = ChannelMLP(6, 12), []
    plain = layer.fc2.forward
    layer.fc2.forward = lambda x: calls.append(x) or plain(x)
    layer(torch.randn(4, 6))
    assert len(calls) == 1


def test_a_norm_between_the_layers_is_applied() -> None:
    layer = ChannelMLP(6, 12, norm_layer=nn.LayerNorm)
    x = torch.randn(4, 6)
    torch.testing.assert_close(layer(x), layer.fc2(layer.norm(layer.act(layer.fc1(x)))))


def test_a_hidden_layer_of_no_channel_is_refused() -> None:
    with pytest.raises(ValueError, match="must have at least one channel, got 0"):
        ChannelMLP(7, 0)
    assert ChannelMLP(7).fc1.out_features == 7
