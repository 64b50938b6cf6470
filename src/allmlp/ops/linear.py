"""The linear map across channels, with the activation behind it where a product can apply it as it is stored."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from allmlp.ops.execution import autocast, is_compiled_inference, is_plain_inference, is_plain_training
from allmlp.ops.gelu import gelu_of_product
from allmlp.ops.products import WITHOUT_INSTRUCTIONS, multiplies_in_float32, multiply

Gelu = Literal["none", "tanh"]


def linear_reference(
    x: Float[Tensor, "*batch read"],
    weight: Float[Tensor, "written read"],
    bias: Float[Tensor, " written"] | None = None,
    gelu: Gelu | None = None,
) -> Float[Tensor, "*batch written"]:
    """`linear` in torch's two calls."""
    y = F.linear(x, weight, bias)
    return y if gelu is None else F.gelu(y, approximate=gelu)


def linear(
    x: Float[Tensor, "*batch read"],
    weight: Float[Tensor, "written read"],
    bias: Float[Tensor, " written"] | None = None,
    gelu: Gelu | None = None,
) -> Float[Tensor, "*batch written"]:
    """`y = x Wᵀ + b`, or `GELU(x Wᵀ + b)`.

    On a CPU with bfloat16 products, oneDNN adds the bias and applies the activation to the accumulated sums as it
    stores them, where torch writes the bias out in front of the product and reads the result again behind it. That is
    for bfloat16 without gradients, in plain execution and in compiled models; in float32 it gains nothing
    (`benchmarks/rejected.py`). On a CPU without 16-bit products more than a few rows are multiplied in float32
    (`ops.products`).

    Args:
        x: any floating dtype.
        weight: `W`.
        bias: `b`.
        gelu: None for no activation; `"none"` for the exact GELU, `"tanh"` for its approximation, in torch's words.

    Returns:
        A new tensor. Products accumulate in float32 for 16-bit inputs.
    """
    given = _given_to_onednn(x, weight, bias)
    if given is not None:
        product = torch.ops.allmlp.linear if torch.compiler.is_compiling() else _product
        return product(*given, gelu=gelu)
    if _gains_in_float32(x, weight, bias):
        y = _widened_product(x, weight, bias)
    elif bias is not None and gelu is not None and is_compiled_inference() and x.is_cpu:
        # torch writes the bias out in front of the product; the compiler adds it in the activation, read once.
        x, weight, bias = autocast(x, weight, bias)
        y = F.linear(x, weight) + bias
    else:
        y = F.linear(x, weight, bias)
    return y if gelu is None else gelu_of_product(y, gelu)


def linear_onto_reference(
    onto: Float[Tensor, "*batch written"],
    x: Float[Tensor, "*batch read"],
    weight: Float[Tensor, "written read"],
    bias: Float[Tensor, " written"] | None = None,
) -> Float[Tensor, "*batch written"]:
    """`linear_onto` in torch's two calls."""
    return onto + F.linear(x, weight, bias)


def linear_onto(
    onto: Float[Tensor, "*batch written"],
    x: Float[Tensor, "*batch read"],
    weight: Float[Tensor, "written read"],
    bias: Float[Tensor, " written"] | None = None,
) -> Float[Tensor, "*batch written"]:
    """`y = onto + x Wᵀ + b`, a residual connection and the linear map at the end of its branch.

    Where `linear` stores bfloat16 products with bias and GELU, this stores them with `onto` added, in plain execution.
    Elsewhere `onto` is added behind the product, in plain inference where that lies.

    Args:
        onto: what the product is added to.
        x: any floating dtype.
        weight: `W`.
        bias: `b`.

    Returns:
        A new tensor. Products accumulate in float32 for 16-bit inputs.
    """
    fits = type(onto) is Tensor and onto.dtype == torch.bfloat16 and onto.is_cpu and onto.is_contiguous()
    if fits and onto.shape == (*x.shape[:-1], weight.shape[0]) and not torch.compiler.is_compiling():
        given = _given_to_onednn(x, weight, bias)
        if given is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(given[0], onto, *given[1:], "add")
    y = linear(x, weight, bias)
    # Another map beside `x`, which may be a wide hidden layer, would be the highest point of memory.
    alone = type(y) is Tensor and is_plain_inference() and torch.result_type(y, onto) == y.dtype
    return y.add_(onto) if alone else onto + y


def linear_weight_gradient(
    grad: Float[Tensor, "*batch written"], x: Float[Tensor, "*batch read"]
) -> Float[Tensor, "written read"]:
    """Of `linear` without activation, given the output's gradient and the input.

    In bfloat16 on a CPU a gradient that is wide enough, and clearly narrower than the input, is transposed in front of
    the product: that and a plain product take less time than the product of what lies transposed.
    """
    written, read = grad.shape[-1], x.shape[-1]
    grad, x = grad.reshape(-1, written), x.reshape(-1, read)
    if multiplies_in_float32(grad, x):
        return multiply(lambda grad, x: grad.t() @ x, grad, x)
    if type(grad) is Tensor and grad.is_cpu and grad.dtype == torch.bfloat16 and 384 <= written <= read // 2:
        # A few rows at a time stay in the cache.
        return torch.cat([rows.t() for rows in grad.split(256)], dim=1) @ x
    return grad.t() @ x


def linear_input_gradient(
    grad: Float[Tensor, "*batch written"], weight: Float[Tensor, "written read"]
) -> Float[Tensor, "*batch read"]:
    """Of `linear` without activation, given the output's gradient."""
    return multiply(torch.matmul, grad, weight)


def linear_bias_gradient(grad: Float[Tensor, "*batch written"]) -> Float[Tensor, " written"]:
    """Of `linear` without activation, given the output's gradient."""
    return grad.reshape(-1, grad.shape[-1]).sum(0)


class _WideningLinear(torch.autograd.Function):
    """A linear map whose factors are kept for backward in the 16 bits they are given in.

    Its backward consists of differentiable operations, so that gradients of any order exist.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return multiply(F.linear, x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            linear_input_gradient(grad, weight) if needs_x else None,
            linear_weight_gradient(grad, x) if needs_weight else None,
            linear_bias_gradient(grad) if needs_bias else None,
        )


def _widened_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if is_plain_training(x, weight, bias):
        return _WideningLinear.apply(*autocast(x, weight, bias))
    return multiply(F.linear, x, weight, bias)


def _gains_in_float32(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `multiply` takes less time than torch: not for a few rows, while decoding, for which torch has a form."""
    return multiplies_in_float32(x, weight, bias) and x.numel() > _FEW_ROWS * x.shape[-1]


def _given_to_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Any, ...] | None:
    """What oneDNN is to multiply; None where it cannot, or where somebody between expects torch's own operators."""
    if type(x) is Tensor and x.dtype != torch.bfloat16 and not torch.is_autocast_enabled("cpu"):
        return None  # asked first: for one image, the questions below are a share of the time
    plain = all(t is None or (type(t) in (Tensor, nn.Parameter) and t.is_cpu) for t in (x, weight, bias))
    if not (plain and _MULTIPLIES_BFLOAT16 and (is_compiled_inference() or _is_unseen()) and x.numel()):
        return None
    given = autocast(x, weight, bias)
    fit = all(t is None or t.dtype == torch.bfloat16 for t in given)
    return given if fit and torch.backends.mkldnn.enabled else None


def _is_unseen() -> bool:
    return is_plain_inference() and torch._C._len_torch_dispatch_stack() == 0


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: str | None) -> Tensor:
    after = "none" if gelu is None else "gelu"
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, after, [], gelu or "none")


# torch's compiler takes oneDNN's operator for frozen weights alone; one of our own it calls as it is. `custom_op` would
# define it with checks that cost much of the gain at every call.
torch.library.define("allmlp::linear", "(Tensor x, Tensor weight, Tensor? bias, str? gelu) -> Tensor")
torch.library.impl("allmlp::linear", "cpu", _product)


@torch.library.register_fake("allmlp::linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: str | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_FEW_ROWS = 4

# Asked once: a compiler cannot ask while it reads.
_MULTIPLIES_BFLOAT16 = torch.bfloat16 not in WITHOUT_INSTRUCTIONS and hasattr(torch.ops.mkldnn, "_linear_pointwise")
