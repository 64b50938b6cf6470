import pytest
import torch
from torch.autograd import gradcheck

from allmlp.ops import spatial_gating, spatial_gating_reference
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
