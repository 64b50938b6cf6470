"""Functions that keep less for backward: the same numbers, the same gradients of every order, fewer bytes."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from allmlp.ops import recomputing_linear, recomputing_linear_reference
from tests.tolerances import assert_close

PROLOGUES: dict[str, Callable[..., Tensor]] = {
    "gelu": F.gelu,
    "product": lambda x, y: F.gelu(x) * y,
    "norm": lambda x, weight: F.layer_norm(x, x.shape[-1:], weight[0, 0]),
    "transposed": lambda x: x.flip(1).contiguous(),
}
ACROSS = ("channels", "tokens", "earlier tokens")
WIDTH = {"channels": 6, "tokens": 5, "earlier tokens": 5}


def _inputs(name: str) -> list[Tensor]:
    count = PROLOGUES[name].__code__.co_argcount if name != "gelu" else 1
    return [torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True) for _ in range(count)]


def _parameters(across: str) -> tuple[Tensor, Tensor]:
    width = WIDTH[across]
    weight = torch.randn(3, width, dtype=torch.float64, requires_grad=True)
    return weight, torch.randn(3, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("name", PROLOGUES)
@pytest.mark.parametrize("across", ACROSS)
def test_gradients_of_first_and_second_order(across: str, name: str) -> None:
    inputs, (weight, bias) = _inputs(name), _parameters(across)

    def function(weight: Tensor, bias: Tensor, *inputs: Tensor) -> Tensor:
        return recomputing_linear(across, PROLOGUES[name], inputs, weight, bias)

    expected = recomputing_linear_reference(across, PROLOGUES[name], inputs, weight, bias)
    assert torch.equal(function(weight, bias, *inputs), expected)
    assert torch.autograd.gradcheck(function, (weight, bias, *inputs))
    assert torch.autograd.gradgradcheck(function, (weight, bias, *inputs))


@pytest.mark.parametrize("frozen", ["weight", "bias", "input", "no bias"])
@pytest.mark.parametrize("across", ACROSS)
def test_what_needs_no_gradient_gets_none(across: str, frozen: str) -> None:
    (x,), (weight, bias) = _inputs("gelu"), _parameters(across)
    given = {"weight": weight, "bias": None if frozen == "no bias" and across == "channels" else bias, "input": x}
    if frozen in given:
        given[frozen].requires_grad_(False)
    wanted = [tensor for tensor in given.values() if tensor is not None and tensor.requires_grad]
    args = (across, F.gelu, (given["input"],), given["weight"], given["bias"])
    out, expected = recomputing_linear(*args), recomputing_linear_reference(*args)
    upstream = torch.randn_like(out)
    for got, exact in zip(
        torch.autograd.grad(out, wanted, upstream), torch.autograd.grad(expected, wanted, upstream), strict=True
    ):
        assert_close(got, exact)


@pytest.mark.parametrize("across", ACROSS)
def test_under_autocast(across: str) -> None:
    x, weight, bias = torch.randn(2, 5, 6), torch.randn(3, WIDTH[across]), torch.randn(3)
    leaves = [tensor.requires_grad_() for tensor in (weight, bias, x)]
    outs, grads = [], []
    for function in (recomputing_linear, recomputing_linear_reference):
        with torch.autocast("cpu", torch.bfloat16):
            out = function(across, F.gelu, (x,), weight, bias)
        assert out.dtype == torch.bfloat16
        outs.append(out)
        grads.append(torch.autograd.grad(out.float().square().sum(), leaves))
    assert torch.equal(*outs)
    for leaf, got, expected in zip(leaves, *grads, strict=True):
        assert got.dtype == leaf.dtype
        assert_close((got / expected.abs().max()).bfloat16(), expected / expected.abs().max())


def test_nothing_but_inputs_and_parameters_is_kept() -> None:
    x, (weight, bias) = torch.randn(4, 5, 6, dtype=torch.float64, requires_grad=True), _parameters("channels")
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        recomputing_linear("channels", F.gelu, (x,), weight, bias)
    assert {tensor.data_ptr() for tensor in kept} == {tensor.data_ptr() for tensor in (x, weight, bias)}


@pytest.mark.parametrize("across", ACROSS)
def test_function_transforms_and_meta_tensors_take_the_plain_form(across: str) -> None:
    (x,), (weight, bias) = _inputs("gelu"), _parameters(across)
    per_sample = torch.func.vmap(
        torch.func.grad(lambda x: recomputing_linear(across, F.gelu, (x[None],), weight, bias).square().sum())
    )(x.detach())
    out = recomputing_linear(across, F.gelu, (x,), weight, bias)
    (expected,) = torch.autograd.grad(out.square().sum(), x)
    assert_close(per_sample, expected)
    meta = recomputing_linear(across, F.gelu, (x.to("meta"),), weight.to("meta"), bias.to("meta"))
    assert meta.shape == out.shape


def test_what_is_computed_again_is_computed_under_the_same_autocast() -> None:
    seen = []

    def prologue(x: Tensor) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return x.tanh()

    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = recomputing_linear("channels", prologue, (x,), weight, None)
    y.float().sum().backward()
    assert seen == [True, True]
