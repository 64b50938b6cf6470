"""The scaling of ResMLP against torch's own operator."""

import pytest
import torch
from torch import Tensor

from allmlp.ops import scaled_add, scaled_add_reference
from tests.tolerances import assert_close


@pytest.mark.parametrize("offset", [(5,), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_output_and_gradients(dtype: torch.dtype, offset: tuple[int, ...]) -> None:
    given = [torch.randn(shape).to(dtype).requires_grad_() for shape in (offset, (5,), (2, 3, 5))]
    exact = [x.detach().double().requires_grad_() for x in given]
    out, expected = scaled_add(*given), scaled_add_reference(*exact)
    assert out.dtype == dtype
    assert_close(out, expected)
    upstream = torch.randn(2, 3, 5).to(dtype)
    grads = torch.autograd.grad(out, given, upstream)
    for grad, expected_grad in zip(grads, torch.autograd.grad(expected, exact, upstream.double()), strict=True):
        assert grad.dtype == dtype
        assert_close(grad, expected_grad)


def test_dtypes_as_under_autocast() -> None:
    given = [torch.randn(2, 5), torch.randn(5), torch.randn(2, 5).bfloat16()]
    ours, theirs = ([x.clone().requires_grad_() for x in given] for _ in range(2))
    out, expected = scaled_add(*ours), scaled_add_reference(*theirs)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    for f, leaves in ((out, ours), (expected, theirs)):
        f.square().sum().backward()
        assert [x.grad.dtype for x in leaves] == [x.dtype for x in leaves]
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_gradients_of_any_order(needed: tuple[bool, ...]) -> None:
    leaves = [torch.randn(shape, dtype=torch.float64).requires_grad_(need) for shape, need in
              zip(((4,), (4,), (3, 4)), needed, strict=True)]  # fmt: skip
    assert torch.autograd.gradcheck(scaled_add, leaves)

    def squared(*given: Tensor) -> Tensor:
        return scaled_add(*given).square()

    assert torch.autograd.gradgradcheck(squared, leaves)
