import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

from allmlp.ops import normalized_spatial_gating_reference, spatial_gating, spatial_gating_reference, toeplitz_product
from allmlp.ops.spatial_gating import apply_gate, normalized_projection, spatial_projection
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


@pytest.mark.parametrize("tokens", [127, 128])
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("batch", [1, 2])
def test_heads_one_by_one_and_all_at_once(batch: int, causal: bool, tokens: int) -> None:
    shapes = [(batch, tokens, 6), (3, tokens, tokens), (3, tokens)]
    v, weight, bias = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    out = spatial_projection(v, weight, bias, causal=causal)
    expected = spatial_gating_reference(torch.ones_like(v), v, weight.tril() if causal else weight, bias)
    assert_close(out, expected)
    upstream = torch.randn_like(expected)
    grads = torch.autograd.grad(out, [v, weight, bias], upstream)
    for grad, reference in zip(grads, torch.autograd.grad(expected, [v, weight, bias], upstream), strict=True):
        assert_close(grad, reference)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("toeplitz", [False, True], ids=["dense", "toeplitz"])
def test_long_causal_products_of_any_heads_leave_work_out(heads: int, toeplitz: bool) -> None:
    v, bias = torch.randn(2, 1000, 8), torch.ones(heads, 1)
    weight = torch.randn(heads, 1999) if toeplitz else torch.randn(heads, 1000, 1000)
    work = []
    for causal in (False, True):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            if toeplitz:
                toeplitz_product(weight, v, bias, causal=causal, backend="dense")
            else:
                spatial_projection(v, weight, bias, causal=causal)
        work.append(counter.get_total_flops())
    assert 0.5 < work[1] / work[0] < 0.6


def test_heads_share_one_copy_of_the_weight() -> None:
    v, weight, bias = torch.randn(8, 256, 4), torch.randn(2, 256, 256, requires_grad=True), torch.ones(2, 256)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        spatial_projection(v, weight, bias)
    assert sum(kept) <= weight.numel() + v.numel()


def test_one_bias_serves_all_tokens() -> None:
    u, v, weight, bias, _ = inputs(2, 4, 4, per_row=False)
    shared = bias[:, :1]
    assert_close(spatial_gating(u, v, weight, shared), spatial_gating_reference(u, v, weight, shared.expand(2, 4)))


def test_derivatives() -> None:
    arguments = [
        torch.randn(s, dtype=torch.float64, requires_grad=True) for s in [(1, 2, 4), (1, 3, 4), (2, 2, 3), (2, 2)]
    ]
    assert gradcheck(spatial_gating, arguments)


def unit(heads: int = 1, dtype: torch.dtype = torch.float64, *, one_bias: bool = False) -> list[Tensor]:
    """The half that makes the gate, the norm's scale and shift, weight and bias: 5 tokens, 6 channels."""
    shapes = [(2, 5, 6), (6,), (6,), (heads, 5, 5), (heads, 1 if one_bias else 5)]
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def projected(v: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return normalized_projection(v, norm_weight, norm_bias, 1e-5, weight, bias)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("heads", "one_bias"), [(1, False), (1, True), (3, False)])
def test_projection_of_the_norm(heads: int, one_bias: bool, causal: bool) -> None:
    given = unit(heads, one_bias=one_bias)

    def gate(*given: Tensor) -> Tensor:
        v, scale, shift, weight, bias = given
        return normalized_projection(v, scale, shift, 1e-5, weight, bias, causal=causal)

    ones = torch.ones(2, 5, 6, dtype=torch.float64)
    v, scale, shift, weight, bias = given
    expected = normalized_spatial_gating_reference(ones, v, scale, shift, 1e-5, weight, bias, causal=causal)
    assert_close(gate(*given), expected)
    assert gradcheck(gate, given)
    assert gradgradcheck(gate, given)


@pytest.mark.parametrize("trained", range(5), ids=["v", "scale", "shift", "weight", "bias"])
def test_gradients_of_a_unit_that_is_frozen_but_for_one(trained: int) -> None:
    given = unit()
    for index, x in enumerate(given):
        x.requires_grad_(index == trained)
    v, scale, shift, weight, bias = given
    plain = weight[0] @ F.layer_norm(v, (6,), scale, shift) + bias[0, :, None]
    upstream = torch.randn(2, 5, 6, dtype=torch.float64)
    grads = [torch.autograd.grad(gate, given[trained], upstream)[0] for gate in (projected(*given), plain)]
    assert_close(*grads)


def test_projection_under_autocast() -> None:
    given = unit(dtype=torch.float32)
    exact = [x.detach().double().requires_grad_() for x in given]
    with torch.autocast("cpu", torch.bfloat16):
        out = projected(given[0].bfloat16(), *given[1:])
    expected = projected(*exact)
    assert out.dtype == torch.bfloat16
    assert_close(out / 8, expected / 8)
    grads = torch.autograd.grad(out.float().square().sum(), given)
    for grad, reference in zip(grads, torch.autograd.grad(expected.square().sum(), exact), strict=True):
        assert grad.dtype == torch.float32
        assert_close((grad / reference.abs().max()).bfloat16(), reference / reference.abs().max())


def test_the_norm_is_not_kept() -> None:
    given = unit()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        projected(*given)
    assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in given}


def test_transformed_or_without_memory_it_is_plain() -> None:
    given = unit()
    loss = lambda v: projected(v[None], *given[1:]).square().sum()  # noqa: E731
    per_sample = torch.func.vmap(torch.func.grad(loss))(given[0].detach())
    (expected,) = torch.autograd.grad(projected(*given).square().sum(), given[0])
    assert_close(per_sample, expected)
    assert projected(*(x.to("meta") for x in given)).shape == (2, 5, 6)


def test_a_gate_of_lower_precision_gives_no_lower_result() -> None:
    u, gate = torch.randn(1, 2, 3), torch.randn(1, 2, 3).bfloat16()
    with torch.no_grad():
        assert torch.equal(apply_gate(u, gate), u * gate.float())
