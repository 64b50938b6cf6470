"""Permute-MLP, the token mixer of Vision Permutator (arXiv 2106.12368, algorithm 1)."""

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor, nn

from allmlp.layers.recomputing import adds_onto, is_plain_linear, mapped, mapped_onto
from allmlp.layers.resampling import GridBound
from allmlp.layers.split_attention import SplitAttention
from allmlp.ops import permute_linear
from allmlp.ops.axial_shift import Axis
from allmlp.ops.execution import autocast
from allmlp.ops.permute_linear import segment_map, segment_rows
from allmlp.ops.resampling import Grid, resample_read, resample_written


@adds_onto
class PermuteMLP(GridBound):
    """Mix along the height, the width and the channels separately, add the three up and project.

    The channels are cut in `segments` of `S = channels / segments`. For the height, the `H·S` numbers that one segment
    has in a column are mapped by one bias-free linear layer (`H·S = channels` in the paper, where `segments = H`); the
    width likewise; the channels by a plain linear map. `y = proj(x_H + x_W + x_C)`.

    Args:
        channels: width of input and output.
        grid_size: (height, width) of the map.
        segments: number of segments, a divisor of `channels`.

    Raises:
        ValueError: if `segments` does not divide `channels`, or the input's map is not `grid_size`.
    """

    grid_parameters = ("mlp_h.weight", "mlp_w.weight")

    def __init__(self, channels: int, grid_size: tuple[int, int], segments: int) -> None:
        super().__init__()
        if channels % segments:
            raise ValueError(f"segments must divide the {channels} channels, got {segments}")
        self.grid_size = grid_size
        self.segments = segments
        height, width = (size * (channels // segments) for size in grid_size)
        self.mlp_h = nn.Linear(height, height, bias=False)
        self.mlp_w = nn.Linear(width, width, bias=False)
        self.mlp_c = nn.Linear(channels, channels, bias=False)
        self.proj = nn.Linear(channels, channels)

    def mix(
        self, x: Float[Tensor, "batch height width channels"]
    ) -> tuple[Float[Tensor, "batch height width channels"], ...]:
        """The three branches: mixed along height, width and channels."""
        if x.shape[1:3] != self.grid_size:
            raise ValueError(f"the input's map is {tuple(x.shape[1:3])}, this layer was built for {self.grid_size}")
        # Once for all three: else each would keep a copy.
        (x,) = autocast(x)
        return self._along(self.mlp_h, x, "height"), self._along(self.mlp_w, x, "width"), mapped(self.mlp_c, x)

    def _along(self, linear: nn.Linear, x: Tensor, axis: Axis) -> Tensor:
        if is_plain_linear(linear, x):
            return permute_linear(x, linear.weight, linear.bias, self.segments, axis)
        size = self.grid_size[0 if axis == "height" else 1]
        return segment_map(linear(segment_rows(x, self.segments, axis)), size, axis)

    def forward(
        self,
        x: Float[Tensor, "batch height width channels"],
        onto: Float[Tensor, "batch height width channels"] | None = None,
    ) -> Float[Tensor, "batch height width channels"]:
        """Mix `x`; the result is added to `onto` where that is given."""
        h, w, c = self.mix(x)
        return mapped_onto(onto, self.proj, h + w + c)

    def trained_grid(self, own: Mapping[str, Tensor]) -> Grid:
        size = self.mlp_c.in_features // self.segments
        return own["mlp_h.weight"].shape[0] // size, own["mlp_w.weight"].shape[0] // size

    def resampled(self, own: Mapping[str, Tensor], grid: Grid, new_grid: Grid) -> dict[str, Tensor]:
        def along(weight: Tensor, old: int, new: int) -> Tensor:
            if old == new:
                return weight
            # Positions written, their channels of a segment, positions read, theirs.
            weight = weight.unflatten(1, (old, -1)).unflatten(0, (old, -1))
            weight = resample_read(resample_written(weight, (old,), (new,)), (old,), (new,), 2)
            return weight.flatten(2).flatten(0, 1)

        return {
            "mlp_h.weight": along(own["mlp_h.weight"], grid[0], new_grid[0]),
            "mlp_w.weight": along(own["mlp_w.weight"], grid[1], new_grid[1]),
        }

    def set_grid_size(self, grid: Grid, new_grid: Grid, parameters: Mapping[str, nn.Parameter] | None = None) -> None:
        super().set_grid_size(grid, new_grid, parameters)
        self.grid_size = (new_grid[0], new_grid[1])
        for linear in (self.mlp_h, self.mlp_w):
            linear.out_features, linear.in_features = linear.weight.shape

    def extra_repr(self) -> str:
        return f"grid_size={self.grid_size}, segments={self.segments}"


@adds_onto
class WeightedPermuteMLP(PermuteMLP):
    """Permute-MLP with split attention in place of the sum: `y = proj(split_attention(x_H, x_W, x_C))`, ViP's default.

    Arguments and errors as for `PermuteMLP`.
    """

    def __init__(self, channels: int, grid_size: tuple[int, int], segments: int) -> None:
        super().__init__(channels, grid_size, segments)
        self.reweight = SplitAttention(channels, 3, bias=True, layout="channel_major")

    def forward(
        self,
        x: Float[Tensor, "batch height width channels"],
        onto: Float[Tensor, "batch height width channels"] | None = None,
    ) -> Float[Tensor, "batch height width channels"]:
        """Mix `x`; the result is added to `onto` where that is given."""
        return mapped_onto(onto, self.proj, self.reweight(self.mix(x)))
