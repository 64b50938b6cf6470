import pytest
import torch

from allmlp.layers import TokenLinear, TokenMixingMLP
from tests.layers.parity import assert_matches, gelu


def mix(p, name, x):
    return torch.stack([p[f"{name}weight"] @ sample for sample in x]) + p[f"{name}bias"][:, None]


def token_mixing(p, name, x):
    return mix(p, f"{name}fc2.", gelu(mix(p, f"{name}fc1.", x)))


@pytest.mark.parametrize(("tokens", "out"), [(7, 5), (4, 4), (1, 3)])
def test_token_linear_matches_reference(tokens, out) -> None:
    assert_matches(TokenLinear(tokens, out), lambda p, x: mix(p, "", x), torch.randn(3, tokens, 6))


def test_token_mixing_mlp_matches_reference() -> None:
    assert_matches(TokenMixingMLP(9, 5), lambda p, x: token_mixing(p, "", x), torch.randn(2, 9, 4))


@pytest.mark.parametrize(("dtype", "times"), [(torch.float32, 1), (torch.bfloat16, 2)], ids=str)
def test_the_hidden_layer_is_kept_behind_the_activation_in_16_bits_alone(dtype: torch.dtype, times: int) -> None:
    mlp, x = TokenMixingMLP(9, 5).to(dtype), torch.randn(2, 9, 4, dtype=dtype)
    kept: dict[int, torch.Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        mlp(x)
    assert sum(t.shape == (2, 5, 4) for t in kept.values()) == times


class Adapter(TokenLinear):
    """Stands where a `TokenLinear` was, and computes something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) - 1


def double(module: torch.nn.Module, given: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
    return 2 * output


@pytest.mark.parametrize("changed", ["nothing", "adapter", "hook"])
def test_exported_token_mixing(changed: str) -> None:
    mlp, x = TokenMixingMLP(9, 5).eval(), torch.randn(2, 9, 4)
    if changed == "adapter":
        mlp.fc1 = Adapter(9, 5)
    if changed == "hook":
        mlp.fc2.register_forward_hook(double)
    program = torch.export.export(mlp, (x,))
    torch.testing.assert_close(program.module()(x), mlp(x))
    if changed == "nothing":
        called = [str(node.target).split(".")[1] for node in program.graph.nodes if node.op == "call_function"]
        assert called == ["transpose", "linear", "gelu", "linear", "transpose"]


def test_token_linear_starts_glorot_uniform_without_bias() -> None:
    layer = TokenLinear(100, 200)
    assert layer.weight.abs().max() <= (6 / 300) ** 0.5
    assert layer.weight.std().item() == pytest.approx((2 / 300) ** 0.5, rel=0.02)
    assert not layer.bias.any()


def test_dropout_acts_behind_both_layers() -> None:
    layer = TokenMixingMLP(9, 5, drop=0.5)
    x = torch.randn(2, 9, 64)
    assert (layer(x) == 0).float().mean() > 0.3
    torch.testing.assert_close(layer.eval()(x), layer(x), rtol=0, atol=0)


def test_another_number_of_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="the input has 8 tokens, this layer mixes exactly 9"):
        TokenMixingMLP(9, 5)(torch.randn(2, 8, 4))
