"""The axial shift of AS-MLP (arXiv 2107.08391, section 3.2), on any device and dtype."""

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
    """`axial_shift` as slices of a map padded with zeros; what tracing compilers are given to fuse."""
    dim, pad = _AXES[axis], shift_size // 2
    padded = F.pad(x, (0, 0, 0, 0, pad, pad) if axis == "height" else (0, 0, pad, pad))
    groups = []
    for group, (start, stop) in enumerate(_groups(x, shift_size)):
        groups.append(padded.narrow(dim, 2 * pad - group, x.shape[dim])[..., start:stop])
    return torch.cat(groups, dim=-1)


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
    if torch.compiler.is_compiling():
        return axial_shift_reference(x, shift_size, axis)
    return _AxialShift.apply(x, shift_size, axis, 1)


def check_shift_size(shift_size: int) -> None:
    """Raise ValueError unless `shift_size` is odd and positive (its offsets are symmetric around zero)."""
    if shift_size < 1 or shift_size % 2 == 0:
        raise ValueError(f"shift_size must be odd and positive, got {shift_size}")


def _groups(x: Tensor, shift_size: int) -> list[tuple[int, int]]:
    """First channel of each group and the one behind its last."""
    channels = x.shape[-1]
    width = -(-channels // shift_size)
    return [(start, min(start + width, channels)) for start in range(0, channels, width)]


class _AxialShift(torch.autograd.Function):
    """The shift with its offsets times `sign`; the derivative of a zero-filled shift is the opposite shift.

    Every element is written once, where autograd through slices would fill and add whole maps.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, shift_size: int, axis: str, sign: int) -> Tensor:
        dim = _AXES[axis]
        size = x.shape[dim]
        out = torch.empty_like(x)
        for group, (start, stop) in enumerate(_groups(x, shift_size)):
            offset = sign * (group - shift_size // 2)
            source, target = x[..., start:stop], out[..., start:stop]
            moved = min(abs(offset), size)
            kept = size - moved
            target.narrow(dim, moved if offset > 0 else 0, kept).copy_(
                source.narrow(dim, 0 if offset > 0 else moved, kept)
            )
            target.narrow(dim, 0 if offset > 0 else kept, moved).zero_()
        return out

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, int, str, int], output: Tensor) -> None:
        _, ctx.shift_size, ctx.axis, ctx.sign = inputs

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _AxialShift.apply(grad, ctx.shift_size, ctx.axis, -ctx.sign), None, None, None

    @staticmethod
    def jvp(ctx, tangent: Tensor, shift_size: None, axis: None, sign: None) -> Tensor:
        return _AxialShift.apply(tangent, ctx.shift_size, ctx.axis, ctx.sign)
