"""The GELU (arXiv 1606.08415), and the form of it that a compiler makes the most of on a CPU."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from allmlp.ops.execution import is_compiled_inference, is_plain_inference


def gelu_reference(x: Float[Tensor, "*shape"], approximate: str = "none") -> Float[Tensor, "*shape"]:
    """`gelu` as torch computes it."""
    return F.gelu(x, approximate=approximate)


def gelu(x: Float[Tensor, "*shape"], approximate: str = "none") -> Float[Tensor, "*shape"]:
    """`y = x Φ(x)` with the normal distribution's `Φ(x) = (1 + erf(x / √2)) / 2`, or its approximation by tanh.

    In compiled inference in float32 on a CPU, `Φ` is 1/2 and a rational function of degree 11 over 10 that differs from
    `Φ − 1/2` by less than 3e-8 / |x| on |x| ≤ 5.6, where 1/2 takes over (`benchmarks/gelu.py` fits it). Rounding adds
    to this: `y` is right to 1.5e-6, torch's to 0.5e-6. The compiler's erf takes longer, and is computed again in every
    kernel that reads the result; this function has too many operations for that, and its result is kept.

    Args:
        x: any floating dtype.
        approximate: `"none"` or `"tanh"`, in torch's words.

    Returns:
        A new tensor.
    """
    if approximate == "none" and is_compiled_inference() and x.is_cpu and x.dtype == torch.float32:
        return x * (0.5 + _central_distribution(x))
    return F.gelu(x, approximate=approximate)


def gelu_of_product(y: Tensor, approximate: str) -> Tensor:
    """The GELU of a product that nobody else reads: written over it in plain inference."""
    if type(y) is Tensor and is_plain_inference():
        return torch.ops.aten.gelu_(y, approximate=approximate)
    return gelu(y, approximate)


def _central_distribution(x: Tensor) -> Tensor:
    """`Φ(x) − 1/2`: odd, so `x` times a function of `x²`."""
    x = x.clamp(-_BOUND, _BOUND)
    square = x * x
    return (x * _polynomial(_NUMERATOR, square) / _polynomial(_DENOMINATOR, square)).clamp(-0.5, 0.5)


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    """By Horner's rule, lowest power first."""
    *lower, highest = coefficients
    y = x * highest + lower[-1]
    for coefficient in lower[-2::-1]:
        y = y * x + coefficient
    return y


# Where the rational function has left ±1/2 behind, and its powers are still numbers.
_BOUND = 6.0
# Of x², lowest power first.
_NUMERATOR = (
    0.3989419010932,
    0.03584744899629,
    0.004805434656583,
    0.0001901573559695,
    6.590533530733e-06,
    2.171008645107e-08,
)
_DENOMINATOR = (1.0, 0.2565189743431, 0.02980410657591, 0.002003368273372, 8.101128817856e-05, 1.185135046002e-06)
