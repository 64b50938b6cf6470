"""The linear maps along height and width of Permute-MLP (arXiv 2106.12368, algorithm 1).

Shape suffixes: B batch, H height, W width, N segments, S channels of a segment.
"""

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from allmlp.ops.axial_shift import Axis, check_axis
from allmlp.ops.backends import Backend, takes_fused
from allmlp.ops.execution import autocast, is_compiled_inference
from allmlp.ops.linear import linear
from allmlp.ops.recomputing import recomputing_linear


def permute_linear_reference(
    x: Float[Tensor, "batch height width channels"],
    weight: Float[Tensor, "numbers numbers"],
    bias: Float[Tensor, " numbers"] | None,
    segments: int,
    axis: Axis,
) -> Float[Tensor, "batch height width channels"]:
    """`permute_linear` written from its equation."""
    x_BHWNS = x.unflatten(-1, (segments, -1))
    size = x.shape[1 if axis == "height" else 2]
    weight_ptis = weight.unflatten(1, (size, -1)).unflatten(0, (size, -1))
    y_BHWNS = torch.einsum("ptis,biwns->bpwnt" if axis == "height" else "ptis,bhins->bhpnt", weight_ptis, x_BHWNS)
    if bias is not None:
        bias_pt = bias.unflatten(0, (size, -1))
        y_BHWNS = y_BHWNS + (bias_pt[:, None, None] if axis == "height" else bias_pt[:, None])
    return y_BHWNS.flatten(3)


def permute_linear(
    x: Float[Tensor, "batch height width channels"],
    weight: Float[Tensor, "numbers numbers"],
    bias: Float[Tensor, " numbers"] | None,
    segments: int,
    axis: Axis,
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "batch height width channels"]:
    """Map the numbers that a segment of the channels has along one axis by one linear layer.

    With `S = channels / segments`, for the height:
    `y[b, p, w, n·S + t] = Σ_{i,s} W[p·S + t, i·S + s]·x[b, i, w, n·S + s] + b[p·S + t]`; for the width likewise.

    For the weight's gradient `x` is kept and not its permutation. The fused form reads `x` and writes `y` in their own
    order and permutes nothing.

    Args:
        x: any floating dtype and device; channels last.
        weight: `W`, of `size of the axis · S` rows and columns.
        bias: `b`.
        segments: number of segments, a divisor of the channels.
        axis: the axis mapped along.
        backend: see `ops.set_fused`; the fused form has no second derivative.

    Returns:
        A new tensor shaped like `x`.

    Raises:
        ValueError: if `axis` is unknown, or `backend` cannot run.
    """
    check_axis(axis)
    size = x.shape[1 if axis == "height" else 2]
    if not takes_fused("permute_linear", backend, x, weight, bias):
        if x.device.type == "cpu" and is_compiled_inference():
            given = autocast(x, weight, bias)
            # A compiler fuses the copies of 16-bit maps with what lies around them, and walks those in a slow order.
            if given[0].element_size() == 2:
                return torch.ops.allmlp.permute_linear_by_copies(*given, segments, axis)
        rows = partial(segment_rows, segments=segments, axis=axis)
        return segment_map(recomputing_linear("channels", rows, (x,), weight, bias), size, axis)
    from allmlp.ops.kernels.permute_linear import permute_linear as fused

    return fused(*autocast(x, weight, bias), segments, axis)


def segment_rows(x: Tensor, segments: int, axis: Axis) -> Tensor:
    """For each position of the other axis and each segment, its numbers along `axis` in one row."""
    x_BHWNS = x.unflatten(-1, (segments, -1))
    return x_BHWNS.permute((0, 2, 3, 1, 4) if axis == "height" else (0, 1, 3, 2, 4)).flatten(3)


def segment_map(rows: Tensor, size: int, axis: Axis) -> Tensor:
    """The map whose `segment_rows` are these, `size` positions along `axis`."""
    order = (0, 3, 1, 2, 4) if axis == "height" else (0, 1, 3, 2, 4)
    return rows.unflatten(-1, (size, -1)).permute(order).flatten(3)


def _by_copies(x: Tensor, weight: Tensor, bias: Tensor | None, segments: int, axis: Axis) -> Tensor:
    size = x.shape[1 if axis == "height" else 2]
    # One segment's map is a view.
    return segment_map(linear(segment_rows(x, segments, axis), weight, bias), size, axis).contiguous()


# Defined without the checks of `custom_op`, which cost time at every call.
torch.library.define(
    "allmlp::permute_linear_by_copies", "(Tensor x, Tensor weight, Tensor? bias, int segments, str axis) -> Tensor"
)
torch.library.impl("allmlp::permute_linear_by_copies", "cpu", _by_copies)


@torch.library.register_fake("allmlp::permute_linear_by_copies")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, segments: int, axis: str) -> Tensor:
    return x.new_empty(x.shape)
