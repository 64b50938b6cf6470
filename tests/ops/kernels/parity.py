"""A fused operator against its reference in float64: output and every gradient."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.tolerances import assert_close

# Kernels are interpreted on a processor.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Operator = Callable[..., Tensor]


def assert_matches(fused: Operator, reference: Operator, inputs: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Fail unless `fused(*inputs)` in `dtype` gives the output and the gradients of `reference(*inputs)` in float64.

    A gradient is compared on its own scale: it may sum over many positions.
    """
    inputs = [x.to(DEVICE, dtype) for x in inputs]
    expected, expected_grads = _run(reference, [x.double() for x in inputs])
    out, grads = _run(fused, inputs)
    assert out.dtype == dtype
    assert_close(out, expected)
    for x, grad, expected_grad in zip(inputs, grads, expected_grads, strict=True):
        assert grad.dtype == dtype
        assert grad.shape == x.shape
        scale = expected_grad.abs().max().clamp_min(1)
        assert_close(grad / scale.to(dtype), expected_grad / scale)


def poisoned_outside(x: Tensor) -> Tensor:
    """`x` as a part of a larger tensor that is NaN everywhere else."""
    larger = torch.full([size + 1 for size in x.shape], torch.nan, dtype=x.dtype, device=x.device)
    inside = larger[tuple(slice(size) for size in x.shape)]
    return inside.copy_(x)


def _run(function: Operator, inputs: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    # The same for every dtype, and exact in each.
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    return out.detach(), torch.autograd.grad(out, inputs, upstream.to(out))
