"""The spatial shift of S²-MLP and S²-MLPv2 as a module."""

from jaxtyping import Float
from torch import Tensor, nn

from allmlp.ops import spatial_shift
from allmlp.ops.spatial_shift import Order, check_order


class SpatialShift(nn.Module):
    """Move each quarter of the channels by one position, the border keeping its value; see `ops.spatial_shift`.

    Args:
        order: `"width_first"` (S²-MLP; S²-MLPv2's second branch) or `"height_first"` (S²-MLPv2's first branch).

    Raises:
        ValueError: for another `order`.
    """

    def __init__(self, order: Order = "width_first") -> None:
        super().__init__()
        check_order(order)
        self.order: Order = order

    def forward(self, x: Float[Tensor, "batch height width channels"]) -> Float[Tensor, "batch height width channels"]:
        return spatial_shift(x, self.order)

    def extra_repr(self) -> str:
        return f"order={self.order!r}"
