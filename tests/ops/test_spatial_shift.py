from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from allmlp.ops import (
    spatial_shift,
    spatial_shift_linear,
    spatial_shift_linear_reference,
    spatial_shift_reference,
)

ORDERS = ("width_first", "height_first")
# One pixel, one row, one column, odd and even sides; fewer channels than groups, and counts four does not divide.
SHAPES = [
    (1, 1, 1, 4),
    (2, 1, 5, 8),
    (2, 4, 1, 8),
    (1, 3, 5, 7),
    (2, 6, 2, 9),
    (1, 2, 2, 3),
    (3, 5, 4, 1),
    (1, 4, 4, 6),
]


def loop(x: Tensor, order: str) -> Tensor:
    """The shift, one element at a time, from the papers' words."""
    batch, height, width, channels = x.shape
    out = torch.empty_like(x)
    quarters = [g * channels // 4 for g in range(5)]
    for b, i, j, c in product(range(batch), range(height), range(width), range(channels)):
        group = max(g for g in range(4) if quarters[g] <= c < quarters[g + 1])
        if order == "height_first":
            group = (group + 2) % 4
        source_i, source_j = i, j
        if group == 0:
            source_j = max(j - 1, 0)
        elif group == 1:
            source_j = min(j + 1, width - 1)
        elif group == 2:
            source_i = max(i - 1, 0)
        else:
            source_i = min(i + 1, height - 1)
        out[b, i, j, c] = x[b, source_i, source_j, c]
    return out


@pytest.mark.parametrize("function", [spatial_shift, spatial_shift_reference])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_a_loop_over_elements(function, order, shape) -> None:
    x = torch.randn(shape)
    torch.testing.assert_close(function(x, order), loop(x, order), rtol=0, atol=0)


@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(1, 5), st.integers(1, 10)),
    order=st.sampled_from(ORDERS),
)
def test_equals_a_loop_at_any_shape(shape, order) -> None:
    x = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
    torch.testing.assert_close(spatial_shift(x, order), loop(x, order), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_moves_every_dtype_unchanged(dtype) -> None:
    x = torch.randn(2, 3, 5, 7).to(dtype)
    out = spatial_shift(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out, loop(x, "width_first"), rtol=0, atol=0)


LAYOUTS = {
    "transposed": lambda x: x.permute(0, 2, 1, 3),
    "channels first": lambda x: x.permute(0, 3, 1, 2),
    "every other channel": lambda x: x[..., ::2],
    "part of the channels": lambda x: x[..., 1:6],
    "expanded": lambda x: x[:1].expand(3, -1, -1, -1),
}


@pytest.mark.parametrize("view", LAYOUTS.values(), ids=LAYOUTS)
def test_any_memory_layout(view) -> None:
    leaf = torch.randn(2, 4, 6, 8, dtype=torch.float64, requires_grad=True)
    x = view(leaf)
    assert not x.is_contiguous()
    torch.testing.assert_close(spatial_shift(x), loop(x.detach(), "width_first"), rtol=0, atol=0)
    upstream = torch.randn_like(x)
    (grad,) = torch.autograd.grad(spatial_shift(x), leaf, upstream)
    (expected,) = torch.autograd.grad(spatial_shift_reference(x), leaf, upstream)
    torch.testing.assert_close(grad, expected)


# torch itself scripts its decompositions for forward derivatives.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 4), (1, 1, 3, 5), (1, 2, 2, 6), (2, 3, 4, 4)], ids=str)
def test_first_and_second_derivatives(order, shape) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: spatial_shift(x, order), x, check_forward_ad=True)
    assert gradgradcheck(lambda x: spatial_shift(x, order), x)
    # The shift is linear; a product makes its second derivative something to get wrong.
    assert gradgradcheck(lambda x: spatial_shift(x * x, order), x)


def test_function_transforms() -> None:
    x = torch.randn(3, 1, 4, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(
        torch.func.vmap(spatial_shift)(x), torch.stack([spatial_shift(sample) for sample in x]), rtol=0, atol=0
    )
    torch.testing.assert_close(
        torch.func.vmap(torch.func.grad(lambda x: spatial_shift(x).square().sum()))(x),
        torch.stack([torch.func.grad(lambda x: spatial_shift_reference(x).square().sum())(sample) for sample in x]),
    )


@pytest.mark.parametrize("order", ORDERS)
def test_linear_map_of_the_shift(order) -> None:
    shapes = ((2, 3, 4, 7), (5, 7), (5,))
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    x, weight, bias = (x.detach() for x in inputs)
    expected = torch.einsum("oc,bhwc->bhwo", weight, loop(x, order)) + bias
    for function in (spatial_shift_linear, spatial_shift_linear_reference):
        torch.testing.assert_close(function(x, weight, bias, order), expected)
    assert gradcheck(lambda *x: spatial_shift_linear(*x, order), inputs)
    assert gradgradcheck(lambda *x: spatial_shift_linear(*x, order), inputs)


def test_result_shares_no_memory() -> None:
    x = torch.randn(1, 1, 1, 4)
    before = x.clone()
    spatial_shift(x).zero_()
    assert torch.equal(x, before)


def test_unknown_order_is_refused() -> None:
    with pytest.raises(ValueError, match="order must be one of width_first, height_first, got 'diagonal'"):
        spatial_shift(torch.zeros(1, 2, 2, 4), "diagonal")
    with pytest.raises(ValueError, match="order must be one of width_first, height_first, got 'diagonal'"):
        spatial_shift_linear(torch.zeros(1, 2, 2, 4), torch.zeros(4, 4), None, "diagonal")
