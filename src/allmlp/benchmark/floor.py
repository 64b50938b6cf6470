"""The floor: the matrix products of a model alone, as it dispatches them."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# Where the two factors stand among the arguments of each product.
_FACTORS = {
    aten.mm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.bmm.default: (0, 1),
    aten.baddbmm.default: (1, 2),
}


@dataclass(frozen=True, kw_only=True)
class Factor:
    """A factor of a product: how it lies in memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: Tensor) -> "Factor":
        return cls(shape=tuple(x.shape), stride=x.stride(), dtype=x.dtype, device=x.device)

    @classmethod
    def batched(cls, batch: int, rows: int, columns: int, like: Tensor) -> "Factor":
        stride = (rows * columns, columns, 1)
        return cls(shape=(batch, rows, columns), stride=stride, dtype=like.dtype, device=like.device)

    @classmethod
    def contiguous(cls, rows: int, columns: int, like: Tensor, *, transposed: bool = False) -> "Factor":
        stride = (1, rows) if transposed else (columns, 1)
        return cls(shape=(rows, columns), stride=stride, dtype=like.dtype, device=like.device)

    def make(self) -> Tensor:
        """A tensor of random numbers that lies in memory like this."""
        size = 1 + sum((length - 1) * step for length, step in zip(self.shape, self.stride, strict=True))
        storage = torch.randn(size, dtype=self.dtype, device=self.device)
        return storage.as_strided(self.shape, self.stride)


@dataclass(frozen=True, kw_only=True)
class Product:
    """One matrix product, `left @ right`, batched or not."""

    left: Factor
    right: Factor

    @property
    def macs(self) -> int:
        return prod(self.left.shape) * self.right.shape[-1]


def record_products(step: Callable[[], object]) -> list[Product]:
    """Run a function and list every matrix product in it, a convolution as the product of its unfolded input.

    Fused attention counts as its products: two forward; five backward, which computes the scores again.

    Gradients must be off by `torch.no_grad()` or on, not off by `torch.inference_mode()`, which hides the products
    inside composite operators.
    """
    with _Recorder() as recorder:
        step()
    return recorder.products


def replay(products: list[Product]) -> Callable[[], None]:
    """A function that computes the products one after another, into memory that is there already.

    The right factor of every product, a weight as a rule, has memory of its own; the left ones share it by shape, as
    activations do.
    """
    lefts = {product.left: product.left.make() for product in products}
    work: list[tuple[Callable[..., Any], Tensor, Tensor, Tensor]] = []
    outs: dict[tuple[Any, ...], Tensor] = {}
    for product in products:
        left, right = lefts[product.left], product.right.make()
        shape = (*left.shape[:-1], right.shape[-1])
        out = outs.setdefault((shape, left.dtype, left.device), left.new_empty(shape))
        work.append((torch.mm if left.dim() == 2 else torch.bmm, left, right, out))

    def run() -> None:
        with torch.no_grad():
            for function, left, right, out in work:
                function(left, right, out=out)

    return run


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.products: list[Product] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _FACTORS:
            left, right = (Factor.of(args[position]) for position in _FACTORS[func])
            # A batched product with one row is a weighted sum of rows, written so.
            if left.shape[-2] > 1 or len(left.shape) == 2:
                self.products.append(Product(left=left, right=right))
        elif func is aten.convolution.default:
            self._convolution(args[1], out)
        elif func is aten.convolution_backward.default:
            self._convolution_backward(args[0], args[2], args[10])
        elif func.name().startswith("aten::_scaled_dot_product"):
            # What the backward operators are given begins with the output's gradient.
            backward = "backward" in func.name()
            self._attention(*args[backward : 3 + backward], backward=backward)
        return out

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, *, backward: bool) -> None:
        heads, (new, size), (read, out) = prod(q.shape[:-2]), q.shape[-2:], v.shape[-2:]
        scores = (new, size, read)
        values = (new, read, out)
        gradients = [(new, out, read), (read, new, out), (new, read, size), (read, new, size)]
        for rows, inner, columns in [scores, *gradients] if backward else [scores, values]:
            left, right = (Factor.batched(heads, *shape, q) for shape in ((rows, inner), (inner, columns)))
            self.products.append(Product(left=left, right=right))

    def _convolution(self, weight: Tensor, out: Tensor) -> None:
        pixels, taps = out.numel() // out.shape[1], weight[0].numel()
        left = Factor.contiguous(pixels, taps, weight)
        right = Factor.contiguous(taps, weight.shape[0], weight, transposed=True)
        self.products.append(Product(left=left, right=right))

    def _convolution_backward(self, grad: Tensor, weight: Tensor, wanted: list[bool]) -> None:
        channels = grad.shape[1]
        pixels, taps = grad.numel() // channels, weight[0].numel()
        if wanted[0]:
            left, right = Factor.contiguous(pixels, channels, weight), Factor.contiguous(channels, taps, weight)
            self.products.append(Product(left=left, right=right))
        if wanted[1]:
            left = Factor.contiguous(channels, pixels, weight, transposed=True)
            self.products.append(Product(left=left, right=Factor.contiguous(pixels, taps, weight)))
