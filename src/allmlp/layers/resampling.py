"""Layers with weights tied to the positions of a token grid."""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from allmlp.ops.resampling import Grid


class GridBound(nn.Module):
    """A layer, some of whose parameters belong to positions of a grid (rows, columns) of tokens, in row-major order.

    Attributes:
        grid_parameters: their names in the layer.
    """

    grid_parameters: ClassVar[tuple[str, ...]]

    def trained_grid(self, own: Mapping[str, Tensor]) -> Grid:
        """(rows, columns) that the layer's `grid_parameters`, by their names, were made for, or (tokens,) if that is
        all that their shapes tell.
        """
        raise NotImplementedError

    def resampled(self, own: Mapping[str, Tensor], grid: Grid, new_grid: Grid) -> dict[str, Tensor]:
        """The `grid_parameters`, by their names, brought from `grid` to `new_grid`."""
        raise NotImplementedError

    def own_grid_parameters(self, layer: str = "this layer") -> dict[str, nn.Parameter]:
        """The `grid_parameters`, by their names.

        Raises:
            ValueError: for one that is computed from others; the message calls the layer `layer`.
        """
        own = dict(self.named_parameters())
        if computed := [name for name in self.grid_parameters if name not in own]:
            raise ValueError(
                f"{layer} cannot be brought to another grid: its {' and '.join(computed)} cannot be replaced, being "
                "computed from other parameters (by pruning, weight norm, an adapter or quantisation); take that off "
                "first, and put it on again afterwards"
            )
        return {name: own[name] for name in self.grid_parameters}

    def resampled_parameters(
        self,
        grid: Grid,
        new_grid: Grid,
        made: dict[nn.Parameter, nn.Parameter] | None = None,
        layer: str = "this layer",
    ) -> dict[str, nn.Parameter]:
        """What `set_grid_size` puts in the place of parameters that change, by their names; the layer stays as it is.

        Args:
            grid: the layer's grid.
            new_grid: the grid of the new parameters.
            made: parameters made before, by those in whose place they stand; what is made here is added. Layers that
                share parameters go on sharing them where they are given one and the same.
            layer: what an error calls the layer.

        Raises:
            ValueError: for a parameter that is computed from others.
        """
        own, made = self.own_grid_parameters(layer), {} if made is None else made
        changed = {}
        for name, value in self.resampled(own, grid, new_grid).items():
            former = own[name]
            if value is not former:
                if former not in made:
                    made[former] = nn.Parameter(value.detach(), requires_grad=former.requires_grad)
                changed[name] = made[former]
        return changed

    def set_grid_size(self, grid: Grid, new_grid: Grid, parameters: Mapping[str, nn.Parameter] | None = None) -> None:
        """Bring the layer from `grid` to `new_grid`, with new parameters in place of those that change.

        Args:
            grid: the layer's grid.
            new_grid: the grid it is brought to.
            parameters: those of `resampled_parameters`, which makes them where this is None.
        """
        parameters = self.resampled_parameters(grid, new_grid) if parameters is None else parameters
        for name, parameter in parameters.items():
            parent, _, attribute = name.rpartition(".")
            setattr(self.get_submodule(parent), attribute, parameter)
