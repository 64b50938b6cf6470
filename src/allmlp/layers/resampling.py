"""Layers with weights tied to the positions of a token grid."""

from collections.abc import Mapping

from torch import Tensor, nn

from allmlp.ops.resampling import Grid


class GridBound(nn.Module):
    """A layer, some of whose parameters belong to positions of a grid (rows, columns) of tokens, in row-major order."""

    def trained_grid(self, own: Mapping[str, Tensor]) -> Grid:
        """(rows, columns) that parameters of this layer, by their names in it, were made for, or (tokens,) if that is
        all that their shapes tell.
        """
        raise NotImplementedError

    def resampled(self, own: Mapping[str, Tensor], grid: Grid, new_grid: Grid) -> dict[str, Tensor]:
        """Those of its parameters `own` that belong to positions, brought from `grid` to `new_grid`."""
        raise NotImplementedError

    def set_grid_size(self, grid: Grid, new_grid: Grid) -> None:
        """Bring the layer from `grid` to `new_grid`, with new parameters in place of those that change."""
        own = dict(self.named_parameters())
        for name, value in self.resampled(own, grid, new_grid).items():
            if value is not own[name]:
                parent, _, attribute = name.rpartition(".")
                parameter = nn.Parameter(value.detach(), requires_grad=own[name].requires_grad)
                setattr(self.get_submodule(parent), attribute, parameter)
