import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from allmlp.ops import (
    mean_over_positions,
    mean_over_positions_reference,
    split_attention,
    split_attention_reference,
)
from tests.tolerances import assert_close


def inputs(branches: int, dtype: torch.dtype = torch.float64, requires_grad: bool = False) -> list[torch.Tensor]:
    shapes = [(2, 3, 5, 7)] * branches + [(2, branches, 7)]
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_(requires_grad) for shape in shapes]


@pytest.mark.parametrize("function", [split_attention, split_attention_reference])
@pytest.mark.parametrize("branches", [1, 2, 3, 5])
def test_weights_sum_to_one_for_each_channel(function, branches) -> None:
    *maps, logits = inputs(branches)
    out = function(maps, logits)
    for sample in range(2):
        for channel in range(7):
            shares = logits[sample, :, channel].exp()
            shares = shares / shares.sum()
            expected = sum(share * branch[sample, :, :, channel] for share, branch in zip(shares, maps, strict=True))
            assert_close(out[sample, :, :, channel], expected)


def test_equal_branches_pass_unchanged() -> None:
    x, logits = torch.randn(2, 3, 5, 7, dtype=torch.float64), torch.randn(2, 3, 7, dtype=torch.float64)
    assert_close(split_attention((x, x, x), logits), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_output_and_gradients_follow_the_float64_reference(dtype) -> None:
    arguments = inputs(3, dtype, requires_grad=True)
    exact = [argument.detach().double().requires_grad_() for argument in arguments]
    out, expected = split_attention(arguments[:3], arguments[3]), split_attention_reference(exact[:3], exact[3])
    assert out.dtype == dtype
    assert_close(out, expected)
    upstream = torch.randn_like(expected)
    grads = torch.autograd.grad(out, arguments, upstream.to(dtype))
    for grad, reference in zip(grads, torch.autograd.grad(expected, exact, upstream), strict=True):
        assert_close(grad, reference)


def test_first_and_second_derivatives() -> None:
    arguments = [torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    arguments.append(torch.randn(1, 3, 3, dtype=torch.float64, requires_grad=True))
    assert gradcheck(lambda *a: split_attention(a[:3], a[3]), arguments)
    assert gradgradcheck(lambda *a: split_attention(a[:3], a[3]), arguments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 5, 7, 11)], ids=str)
def test_mean_over_positions(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    out, expected = mean_over_positions(x), mean_over_positions_reference(exact)
    assert_close(out, expected)
    upstream = torch.randn(out.shape).to(dtype)
    (grad,) = torch.autograd.grad(out, x, upstream)
    (expected_grad,) = torch.autograd.grad(expected, exact, upstream.double())
    assert_close(grad, expected_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_means_gradient_is_not_written_out(dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, 7, 11).to(dtype).requires_grad_()
    (grad,) = torch.autograd.grad(mean_over_positions(x).sum(), x)
    assert grad.stride()[1:3] == (0, 0)
