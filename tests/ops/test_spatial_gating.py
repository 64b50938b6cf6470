import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from allmlp.ops import (
    activated_spatial_gating,
    activated_spatial_gating_reference,
    spatial_gating,
    spatial_gating_reference,
)
from tests.tolerances import assert_close


def inputs(heads: int, written: int, read: int, *, per_row: bool, dtype: torch.dtype = torch.float64) -> list:
    rows = (3,) if per_row else ()
    shapes = [(3, written, 6), (3, read, 6), (*rows, heads, written, read), (*rows, heads, written), (3, written, 6)]
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def test_reference_is_the_equation() -> None:
    u, v, weight, bias, residual = inputs(2, 4, 5, per_row=False)
    out = spatial_gating_reference(u, v, weight, bias, residual, torch.tanh)
    for b in range(3):
        for i in range(4):
            for e in range(6):
                gate = weight[e // 3, i] @ v[b, :, e] + bias[e // 3, i] + residual[b, i, e]
                assert_close(out[b, i, e], u[b, i, e] * torch.tanh(gate))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "residual-and-activation"])
@pytest.mark.parametrize("per_row", [False, True], ids=["one-weight", "weight-per-row"])
@pytest.mark.parametrize(("heads", "written", "read"), [(1, 5, 5), (2, 7, 7), (3, 1, 9), (6, 2, 3)])
def test_output_and_gradients_follow_the_float64_reference(heads, written, read, per_row, extras, dtype) -> None:
    arguments = inputs(heads, written, read, per_row=per_row, dtype=dtype)
    arguments = arguments if extras else arguments[:4]
    act = {"gate_act": torch.sigmoid} if extras else {}
    exact = [argument.detach().double().requires_grad_() for argument in arguments]
    out, expected = spatial_gating(*arguments, **act), spatial_gating_reference(*exact, **act)
    assert out.dtype == dtype
    assert_close(out, expected)
    upstream = torch.randn_like(expected)
    grads = torch.autograd.grad(out, arguments, upstream.to(dtype))
    for grad, reference in zip(grads, torch.autograd.grad(expected, exact, upstream), strict=True):
        assert_close(grad, reference)


def test_one_bias_serves_all_tokens() -> None:
    u, v, weight, bias, _ = inputs(2, 4, 4, per_row=False)
    shared = bias[:, :1]
    assert_close(spatial_gating(u, v, weight, shared), spatial_gating_reference(u, v, weight, shared.expand(2, 4)))


def test_derivatives() -> None:
    arguments = [
        torch.randn(s, dtype=torch.float64, requires_grad=True) for s in [(1, 2, 4), (1, 3, 4), (2, 2, 3), (2, 2)]
    ]
    assert gradcheck(spatial_gating, arguments)


def unit(dtype: torch.dtype = torch.float64, *, one_bias: bool = False) -> list[Tensor]:
    """Expansion, norm's scale and shift, weight and bias of a whole unit of 5 tokens and 6 channels."""
    shapes = [(2, 5, 12), (6,), (6,), (5, 5), (1 if one_bias else 5,)]
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def gated(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return activated_spatial_gating(x, norm_weight, norm_bias, 1e-5, weight, bias)


def gated_reference(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return activated_spatial_gating_reference(x, norm_weight, norm_bias, 1e-5, weight, bias)


@pytest.mark.parametrize("one_bias", [False, True])
def test_whole_unit_with_its_activation(one_bias: bool) -> None:
    given = unit(one_bias=one_bias)
    u, v = F.gelu(given[0]).chunk(2, -1)
    z = F.layer_norm(v, (6,), *given[1:3])
    assert_close(gated(*given), u * (given[3] @ z + given[4][:, None]))
    assert gradcheck(gated, given)
    assert gradgradcheck(gated, given)


@pytest.mark.parametrize("trained", range(5), ids=["x", "scale", "shift", "weight", "bias"])
def test_gradients_of_a_unit_that_is_frozen_but_for_one(trained: int) -> None:
    given = unit()
    for index, x in enumerate(given):
        x.requires_grad_(index == trained)
    upstream = torch.randn(2, 5, 6, dtype=torch.float64)
    grads = [
        torch.autograd.grad(function(*given), given[trained], upstream)[0] for function in (gated, gated_reference)
    ]
    assert_close(*grads)


def test_unit_under_autocast() -> None:
    given = unit(torch.float32)
    exact = [x.detach().double().requires_grad_() for x in given]
    with torch.autocast("cpu", torch.bfloat16):
        out = gated(given[0].bfloat16(), *given[1:])
    expected = gated_reference(*exact)
    assert out.dtype == torch.bfloat16
    assert_close(out / 8, expected / 8)
    grads = torch.autograd.grad(out.float().square().sum(), given)
    for grad, reference in zip(grads, torch.autograd.grad(expected.square().sum(), exact), strict=True):
        assert grad.dtype == torch.float32
        assert_close((grad / reference.abs().max()).bfloat16(), reference / reference.abs().max())


def test_unit_keeps_its_input_and_the_gate() -> None:
    given = unit()
    kept: set[int] = set()

    def keep(x: Tensor) -> Tensor:
        kept.add(x.data_ptr())
        return x.clone()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        gated(*given)
    assert len(kept) == len(given) + 1
    assert {x.data_ptr() for x in given} <= kept


def test_unit_transformed_or_without_memory_is_plain() -> None:
    given = unit()
    loss = lambda x: gated(x[None], *given[1:]).square().sum()  # noqa: E731
    per_sample = torch.func.vmap(torch.func.grad(loss))(given[0].detach())
    (expected,) = torch.autograd.grad(gated(*given).square().sum(), given[0])
    assert_close(per_sample, expected)
    assert gated(*(x.to("meta") for x in given)).shape == (2, 5, 6)
