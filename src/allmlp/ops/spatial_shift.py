"""The spatial shift of S²-MLP (arXiv 2106.07477, algorithm 1) and S²-MLPv2 (arXiv 2108.01072, eq. 1), and the linear
map behind it.

The papers' in-place slice assignments read memory they have already overwritten; here the result is a new tensor.
"""

from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from allmlp.ops.backends import Backend, takes_fused
from allmlp.ops.execution import autocast, is_plain_inference
from allmlp.ops.linear import linear

Order = Literal["width_first", "height_first"]
_HEIGHT, _WIDTH = -3, -2
_GROUPS: dict[str, tuple[tuple[int, int], ...]] = {
    "width_first": ((_WIDTH, 1), (_WIDTH, -1), (_HEIGHT, 1), (_HEIGHT, -1)),
    "height_first": ((_HEIGHT, 1), (_HEIGHT, -1), (_WIDTH, 1), (_WIDTH, -1)),
}


def spatial_shift_reference(
    x: Float[Tensor, "batch height width channels"], order: Order = "width_first"
) -> Float[Tensor, "batch height width channels"]:
    """`spatial_shift` as slices of a map whose border is repeated once; what tracing compilers are given to fuse."""
    repeated = {
        axis: torch.cat((x.narrow(axis, 0, 1), x, x.narrow(axis, x.shape[axis] - 1, 1)), axis)
        for axis in (_HEIGHT, _WIDTH)
    }
    groups = []
    for (start, stop), (axis, step) in zip(_quarters(x), _GROUPS[order], strict=True):
        groups.append(repeated[axis].narrow(axis, 1 - step, x.shape[axis])[..., start:stop])
    return torch.cat(groups, dim=-1)


def spatial_shift(
    x: Float[Tensor, "batch height width channels"], order: Order = "width_first"
) -> Float[Tensor, "batch height width channels"]:
    """Move each quarter of the channels by one position, the border keeping its own value.

    Quarter `g` holds the channels `[g·C//4, (g+1)·C//4)`. With `order="width_first"` (S²-MLP, and S²-MLPv2's second
    branch) the quarters move by +1 and −1 along the width, then +1 and −1 along the height: `y[w] = x[max(w − 1, 0)]`
    for the first. `order="height_first"` (S²-MLPv2's first branch) exchanges the axes.

    Args:
        x: any dtype and device; channels last.
        order: which axis the first two quarters move along.

    Returns:
        A new tensor shaped like `x`.

    Raises:
        ValueError: for another `order`.
    """
    check_order(order)
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return spatial_shift_reference(x, order)
    return _shifted(x, order, False)


def spatial_shift_linear_reference(
    x: Float[Tensor, "batch height width channels"],
    weight: Float[Tensor, "outputs channels"],
    bias: Float[Tensor, " outputs"] | None,
    order: Order = "width_first",
) -> Float[Tensor, "batch height width outputs"]:
    """`spatial_shift_linear` from its two halves."""
    return F.linear(spatial_shift_reference(x, order), weight, bias)


def spatial_shift_linear(
    x: Float[Tensor, "batch height width channels"],
    weight: Float[Tensor, "outputs channels"],
    bias: Float[Tensor, " outputs"] | None,
    order: Order = "width_first",
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "batch height width outputs"]:
    """`W·spatial_shift(x) + b`.

    The fused form reads each channel from where the shift takes it and never writes a shifted map, neither here nor for
    the weight's gradient, for which it keeps `x`.

    Args:
        x: any floating dtype and device; channels last.
        weight: `W`.
        bias: `b`.
        order: which axis the first two quarters move along; see `spatial_shift`.
        backend: see `ops.set_fused`; the fused form has no second derivative.

    Returns:
        A new tensor.

    Raises:
        ValueError: for another `order`, or if `backend` cannot run.
    """
    check_order(order)
    if not takes_fused("spatial_shift_linear", backend, x, weight, bias):
        return linear(spatial_shift(x, order), weight, bias)
    from allmlp.ops.kernels.shifted_linear import shifted_linear

    starts = [start for start, _ in _quarters(x)]
    down = [step if axis == _HEIGHT else 0 for axis, step in _GROUPS[order]]
    right = [step if axis == _WIDTH else 0 for axis, step in _GROUPS[order]]
    return shifted_linear(*autocast(x, weight, bias), starts, down, right, True)


def check_order(order: str) -> None:
    """Raise ValueError unless `order` is one of the papers' two."""
    if order not in _GROUPS:
        raise ValueError(f"order must be one of {', '.join(_GROUPS)}, got {order!r}")


def _quarters(x: Tensor) -> list[tuple[int, int]]:
    """First channel of each group and the one behind its last."""
    return list(pairwise(g * x.shape[-1] // 4 for g in range(5)))


def _shift(x: Tensor, order: str, adjoint: bool) -> Tensor:
    """The shift or, with `adjoint`, its transpose; every element is written once."""
    out = torch.empty_like(x)
    widths = [stop - start for start, stop in _quarters(x)]
    quarters = zip(x.split(widths, -1), out.split(widths, -1), _GROUPS[order], strict=True)
    for source, target, (axis, step) in quarters:
        size = x.shape[axis]
        if adjoint:
            step = -step
        target.narrow(axis, max(step, 0), size - 1).copy_(source.narrow(axis, max(-step, 0), size - 1))
        # Nothing moves to the border that the values move away from.
        border = 0 if step > 0 else size - 1
        if adjoint:
            # Forward, the opposite border kept its value and handed it on as well: both gradients add up there.
            target.narrow(axis, border, 1).zero_()
            kept = size - 1 - border
            target.narrow(axis, kept, 1).add_(source.narrow(axis, kept, 1))
        else:
            target.narrow(axis, border, 1).copy_(source.narrow(axis, border, 1))
    return out


def _shifted(x: Tensor, order: str, adjoint: bool) -> Tensor:
    # `apply` binds its arguments by signature at every call, which shows where maps are small.
    return (_shift if is_plain_inference() else _SpatialShift.apply)(x, order, adjoint)


class _SpatialShift(torch.autograd.Function):
    """The shift and its transpose: each is the other's derivative, so any order of gradient exists.

    Autograd through slices would fill and add whole maps.
    """

    generate_vmap_rule = True
    forward = staticmethod(_shift)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, str, bool], output: Tensor) -> None:
        _, ctx.order, ctx.adjoint = inputs

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _shifted(grad, ctx.order, not ctx.adjoint), None, None

    @staticmethod
    def jvp(ctx, tangent: Tensor, order: None, adjoint: None) -> Tensor:
        return _shifted(tangent, ctx.order, ctx.adjoint)
