"""The GELU (arXiv 1606.08415), and the form of it that a compiler makes the most of on a CPU."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from allmlp.ops.execution import is_compiled, is_plain_inference


def gelu_reference(x: Float[Tensor, "*shape"], approximate: str = "none") -> Float[Tensor, "*shape"]:
    """`gelu` as torch computes it."""
    return F.gelu(x, approximate=approximate)


def gelu(x: Float[Tensor, "*shape"], approximate: str = "none") -> Float[Tensor, "*shape"]:
    """`y = x Φ(x)` with the normal distribution's `Φ(x) = (1 + erf(x / √2)) / 2`, or its approximation by tanh.

    Compiled on a CPU in float32, bfloat16 or float16 it is `y = max(x, 0) − |x| Φ(−|x|)` with `Φ(−t) = 1 / (2 p(t)¹⁶)`,
    the polynomial `p` of degree 8 (the form of Abramowitz and Stegun, 7.1.28). It takes less time than the compiler's
    error function (`benchmarks/gelu.py` fits and times it), and its derivative comes of the same polynomial. Computed
    in float32, `y` is right to 0.5e-6, its derivative to 1.5e-6; torch's to 1.2e-6 and 0.3e-6. At infinity it is NaN.

    Args:
        x: any floating dtype.
        approximate: `"none"` or `"tanh"`, in torch's words.

    Returns:
        A new tensor.
    """
    if approximate == "none" and is_compiled() and x.is_cpu and x.dtype in _COMPUTED_IN_FLOAT32:
        return _ByTail.apply(x) if torch.is_grad_enabled() and x.requires_grad else _in_float32(_by_tail, x)
    return F.gelu(x, approximate=approximate)


def gelu_of_product(y: Tensor, approximate: str) -> Tensor:
    """The GELU of a product that nobody else reads: written over it in plain inference."""
    if type(y) is Tensor and is_plain_inference():
        return torch._C._nn.gelu_(y, approximate=approximate)  # type: ignore[attr-defined]  (no stub)
    return gelu(y, approximate)


class _ByTail(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _in_float32(_by_tail, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (grad.float() * _derivative(x.float())).to(x.dtype)


def _in_float32(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return function(x.float()).to(x.dtype)


def _by_tail(x: Tensor) -> Tensor:
    t = x.abs()
    # A power: of a product of p with itself the compiler writes p out for each factor, and takes minutes over it.
    # |x| is halved in front of the division, which then gives no subnormal numbers.
    return F.relu(x) - 0.5 * t / _polynomial(_root(), t).pow(16)


def _derivative(x: Tensor) -> Tensor:
    """`Φ(x) + x Φ′(x)`: of a negative `x` the derivative of the tail's part, `(p − 16 t p′) / (2 p¹⁷)`."""
    # Φ(−12) is nothing beside 1, and the powers of p are still numbers.
    t = x.abs().clamp(max=12.0)
    root = _root()
    p, slope = _polynomial(root, t), [16 * power * coefficient for power, coefficient in enumerate(root)][1:]
    below = 0.5 * (p - t * _polynomial(slope, t)) / p.pow(17)
    return torch.where(x > 0, 1 - below, below)


def _polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    """By Horner's rule, lowest power first."""
    *lower, highest = coefficients
    y = x * highest + lower[-1]
    for coefficient in lower[-2::-1]:
        y = y * x + coefficient
    return y


def _root() -> tuple[float, ...]:
    """Of `p(t)`, the sixteenth root of 1 / (2 Φ(−t)), the coefficients, lowest power first."""
    # No global numbers: compiled with dynamic=True these are symbols, which no two calls of a function of autograd in
    # one graph can share.
    return (
        1.0,
        0.04986793587812,
        0.02113631439028,
        0.003288965461642,
        2.771207290634e-05,
        5.087498421709e-05,
        7.450044328981e-06,
        -1.128487321913e-06,
        1.586796252236e-07,
    )


_COMPUTED_IN_FLOAT32 = {torch.float32, torch.bfloat16, torch.float16}
