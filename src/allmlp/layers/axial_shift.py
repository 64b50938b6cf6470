"""AS-MLP's token mixer (arXiv 2107.08391, figure 2)."""

from jaxtyping import Float
from torch import Tensor, nn

from allmlp.layers.recomputing import (
    activated,
    adds_onto,
    is_plain_linear,
    is_repeatable,
    is_watched,
    linear_after,
    mapped,
    mapped_onto,
    pass_unchanged,
)
from allmlp.layers.sample_norm import SampleNorm, sample_norm
from allmlp.ops import axial_shift, axial_shift_linear
from allmlp.ops.axial_shift import Axis, check_shift_size


@adds_onto
class AxialShift(nn.Module):
    """Mix tokens by shifting channel groups along the width and along the height, between channel projections.

    `h = GELU(norm1(conv1(x)))`, then
    `y = conv3(norm2(GELU(conv2_1(shift_W(h))) + GELU(conv2_2(shift_H(h)))))`. The projections are the paper's 1×1
    convolutions, written as linear maps of the last dimension.

    Args:
        channels: width of input and output.
        shift_size: number of offsets, odd; see `ops.axial_shift`.
        drop: dropout rate of the output.

    Raises:
        ValueError: if `shift_size` is not odd and positive.
    """

    def __init__(self, channels: int, shift_size: int = 5, drop: float = 0.0) -> None:
        super().__init__()
        check_shift_size(shift_size)
        self.shift_size = shift_size
        self.conv1 = nn.Linear(channels, channels)
        self.norm1 = SampleNorm(channels)
        self.act = nn.GELU()
        self.conv2_1 = nn.Linear(channels, channels)
        self.conv2_2 = nn.Linear(channels, channels)
        self.norm2 = SampleNorm(channels)
        self.conv3 = nn.Linear(channels, channels)
        self.drop = nn.Dropout(drop)

    def forward(
        self,
        x: Float[Tensor, "batch height width channels"],
        onto: Float[Tensor, "batch height width channels"] | None = None,
    ) -> Float[Tensor, "batch height width channels"]:
        """Mix `x`; the result is added to `onto` where that is given."""
        x = activated(self.act, self.norm1(mapped(self.conv1, x)))
        along_width, along_height = self._along(self.conv2_1, x, "width"), self._along(self.conv2_2, x, "height")
        merges = type(self.norm2) is SampleNorm and not is_watched(self.norm2) and is_repeatable(self.act)
        if not merges:
            y = self.conv3(self.norm2(self.act(along_width) + self.act(along_height)))
        else:
            merged = along_width, along_height, self.norm2.weight, self.norm2.bias
            if onto is not None and pass_unchanged(x, self.drop):
                return mapped_onto(onto, self.conv3, self._merge(*merged))
            y = linear_after(self.conv3, self._merge, *merged)
        y = self.drop(y)
        return y if onto is None else onto + y

    def _along(self, linear: nn.Linear, x: Tensor, axis: Axis) -> Tensor:
        if is_plain_linear(linear, x):
            return axial_shift_linear(x, linear.weight, linear.bias, self.shift_size, axis)
        return linear(axial_shift(x, self.shift_size, axis))

    def _merge(self, along_width: Tensor, along_height: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        merged = activated(self.act, along_width) + activated(self.act, along_height)
        return sample_norm(merged, weight, bias, self.norm2.eps)

    def extra_repr(self) -> str:
        return f"shift_size={self.shift_size}"
