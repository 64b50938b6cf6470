"""The axial shift of AS-MLP (arXiv 2107.08391, section 3.2), on any device and dtype."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Axis = Literal["height", "width"]
_AXES: dict[str, int] = {"height": -3, "width": -2}


def axial_shift_reference(
    x: Float[Tensor, "batch height width channels"], shift_size: int, axis: Axis
) -> Float[Tensor, "batch height width channels"]:
    """`axial_shift` as the paper writes it: pad with zeros, cut the channels, roll each group, cut the padding off."""
    dim, pad = _AXES[axis], shift_size // 2
    padded = F.pad(x, (0, 0, pad, pad, pad, pad))
    groups = [part.roll(s, dim) for part, s in zip(padded.chunk(shift_size, -1), range(-pad, pad + 1), strict=False)]
    return torch.cat(groups, dim=-1)[:, pad : pad + x.shape[1], pad : pad + x.shape[2]]


def axial_shift(
    x: Float[Tensor, "batch height width channels"], shift_size: int, axis: Axis
) -> Float[Tensor, "batch height width channels"]:
    """Move groups of channels along one axis by different offsets, filling with zeros.

    Group `g` holds `ceil(C / shift_size)` channels (the last one what is left; there may be fewer groups than
    `shift_size`) and moves by `s = g − ⌊shift_size / 2⌋`: `y[i] = x[i − s]`, zero where `i − s` is outside.

    Args:
        x: any dtype and device; channels last.
        shift_size: number of offsets, odd.
        axis: the axis moved along.

    Returns:
        A new tensor shaped like `x`.

    Raises:
        ValueError: if `shift_size` is not odd and positive, or `axis` is unknown.
    """
    if axis not in _AXES:
        raise ValueError(f"axis must be one of {', '.join(_AXES)}, got {axis!r}")
    check_shift_size(shift_size)
    return _AxialShift.apply(x, shift_size, axis, 1)


def check_shift_size(shift_size: int) -> None:
    """Raise ValueError unless `shift_size` is odd and positive (its offsets are symmetric around zero)."""
    if shift_size < 1 or shift_size % 2 == 0:
        raise ValueError(f"shift_size must be odd and positive, got {shift_size}")


class _AxialShift(torch.autograd.Function):
    """The shift times `sign`; the derivative of a zero-filled shift is the opposite shift."""

    @staticmethod
    def forward(ctx, x: Tensor, shift_size: int, axis: str, sign: int) -> Tensor:
        ctx.shift_size, ctx.axis, ctx.sign = shift_size, axis, sign
        dim, channels = _AXES[axis], x.shape[-1]
        size, width = x.shape[dim], math.ceil(channels / shift_size)
        out = torch.empty_like(x)
        for group, start in enumerate(range(0, channels, width)):
            offset = sign * (group - shift_size // 2)
            source, target = x[..., start : start + width], out[..., start : start + width]
            moved = min(abs(offset), size)
            kept = size - moved
            forward = offset > 0
            target.narrow(dim, moved if forward else 0, kept).copy_(source.narrow(dim, 0 if forward else moved, kept))
            if offset:
                target.narrow(dim, 0 if forward else kept, moved).zero_()
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _AxialShift.apply(grad, ctx.shift_size, ctx.axis, -ctx.sign), None, None, None
