"""The axial shift of AS-MLP (arXiv 2107.08391, section 3.2), on any device and dtype, and the linear map behind it."""

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from allmlp.ops.backends import Backend, takes_fused
from allmlp.ops.execution import autocast, is_compiled, is_plain_inference
from allmlp.ops.recomputing import recomputing_linear

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
    check_axis(axis)
    check_shift_size(shift_size)
    if torch.compiler.is_compiling():
        # Fused into what reads 16-bit slices, the norm and the activation in front are computed again for each of them.
        if x.device.type == "cpu" and x.element_size() == 2 and is_compiled():
            return torch.ops.allmlp.axial_shift(x, shift_size, axis, 1)
        return axial_shift_reference(x, shift_size, axis)
    return _shifted(x, shift_size, axis, 1)


def axial_shift_linear_reference(
    x: Float[Tensor, "batch height width channels"],
    weight: Float[Tensor, "outputs channels"],
    bias: Float[Tensor, " outputs"] | None,
    shift_size: int,
    axis: Axis,
) -> Float[Tensor, "batch height width outputs"]:
    """`axial_shift_linear` from its two halves."""
    return F.linear(axial_shift_reference(x, shift_size, axis), weight, bias)


def axial_shift_linear(
    x: Float[Tensor, "batch height width channels"],
    weight: Float[Tensor, "outputs channels"],
    bias: Float[Tensor, " outputs"] | None,
    shift_size: int,
    axis: Axis,
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "batch height width outputs"]:
    """`W·axial_shift(x) + b`, for whose gradient `x` is kept and not the shifted map.

    The fused form reads each channel from where the shift takes it and never writes a shifted map, neither here nor for
    the weight's gradient.

    Args:
        x: any floating dtype and device; channels last.
        weight: `W`.
        bias: `b`.
        shift_size: number of offsets, odd; see `axial_shift`.
        axis: the axis moved along.
        backend: see `ops.set_fused`; the fused form has no second derivative.

    Returns:
        A new tensor.

    Raises:
        ValueError: if `shift_size` is not odd and positive, `axis` is unknown, or `backend` cannot run.
    """
    check_axis(axis)
    check_shift_size(shift_size)
    if not takes_fused("axial_shift_linear", backend, x, weight, bias):
        shift = partial(axial_shift, shift_size=shift_size, axis=axis)
        return recomputing_linear("channels", shift, (x,), weight, bias)
    from allmlp.ops.kernels.shifted_linear import shifted_linear

    starts = [start for start, _ in _groups(x, shift_size)]
    moves, still = [group - shift_size // 2 for group in range(len(starts))], [0] * len(starts)
    down, right = (moves, still) if axis == "height" else (still, moves)
    return shifted_linear(*autocast(x, weight, bias), starts, down, right, False)


def check_axis(axis: str) -> None:
    """Raise ValueError unless `axis` is one of a map's two."""
    if axis not in _AXES:
        raise ValueError(f"axis must be one of {', '.join(_AXES)}, got {axis!r}")


def check_shift_size(shift_size: int) -> None:
    """Raise ValueError unless `shift_size` is odd and positive (its offsets are symmetric around zero)."""
    if shift_size < 1 or shift_size % 2 == 0:
        raise ValueError(f"shift_size must be odd and positive, got {shift_size}")


def _groups(x: Tensor, shift_size: int) -> list[tuple[int, int]]:
    """First channel of each group and the one behind its last."""
    # A whole number while a graph is drawn, too: one that divides would do it in ONNX's way.
    channels = int(x.shape[-1])
    width = -(-channels // shift_size)
    return [(start, min(start + width, channels)) for start in range(0, channels, width)]


def _shift(x: Tensor, shift_size: int, axis: str, sign: int) -> Tensor:
    """The shift with its offsets times `sign`; every element is written once."""
    dim = _AXES[axis]
    size = x.shape[dim]
    out = torch.empty_like(x)
    for group, (start, stop) in enumerate(_groups(x, shift_size)):
        offset = sign * (group - shift_size // 2)
        source, target = x[..., start:stop], out[..., start:stop]
        moved = min(abs(offset), size)
        kept = size - moved
        target.narrow(dim, moved if offset > 0 else 0, kept).copy_(source.narrow(dim, 0 if offset > 0 else moved, kept))
        target.narrow(dim, 0 if offset > 0 else kept, moved).zero_()
    return out


def _shifted(x: Tensor, shift_size: int, axis: Axis, sign: int) -> Tensor:
    # `apply` binds its arguments by signature at every call, which shows where maps are small.
    if is_plain_inference():
        return _shift(x, shift_size, axis, sign)
    # A trace that holds a function of Python's cannot be saved.
    if torch.jit.is_tracing() and sign == 1:
        return axial_shift_reference(x, shift_size, axis)
    return _AxialShift.apply(x, shift_size, axis, sign)


class _AxialShift(torch.autograd.Function):
    """The derivative of a zero-filled shift is the opposite shift.

    Autograd through slices would fill and add whole maps.
    """

    generate_vmap_rule = True
    forward = staticmethod(_shift)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, int, str, int], output: Tensor) -> None:
        _, ctx.shift_size, ctx.axis, ctx.sign = inputs

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _shifted(grad, ctx.shift_size, ctx.axis, -ctx.sign), None, None, None

    @staticmethod
    def jvp(ctx, tangent: Tensor, shift_size: None, axis: None, sign: None) -> Tensor:
        return _shifted(tangent, ctx.shift_size, ctx.axis, ctx.sign)


def _shift_back(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return torch.ops.allmlp.axial_shift(grad, ctx.shift_size, ctx.axis, -ctx.sign), None, None, None


torch.library.define("allmlp::axial_shift", "(Tensor x, int shift_size, str axis, int sign) -> Tensor")
torch.library.impl("allmlp::axial_shift", "cpu", _shift)
torch.library.register_fake("allmlp::axial_shift", lambda x, shift_size, axis, sign: torch.empty_like(x))
torch.library.register_autograd("allmlp::axial_shift", _shift_back, setup_context=_AxialShift.setup_context)
