"""Weights for another image size than the one they were trained at; docs/resolution.md compares the ways."""

import copy
import math
from collections.abc import Iterator
from typing import Any

from timm.layers import resample_patch_embed
from torch import Tensor, nn

from allmlp.layers import GridBound, PatchDownsampling, PatchEmbedding, PatchMerging
from allmlp.ops.resampling import Grid, guess_grid


def resample_state_dict(state_dict: dict[str, Any], model: Any, grid: Grid | None = None) -> dict[str, Any]:
    """Weights trained at another image size, patch size or kernel, resampled to those of `model`; others as they are.

    Args:
        state_dict: weights of such a model.
        model: the `VisionMLP` they are for.
        grid: (rows, columns) of the patches they were trained on. Where it is None and the weights tell no more than a
            number of tokens: the model's own grid if it has as many, else a square or a grid of the model's
            proportions.

    Raises:
        ValueError: if the number of tokens fits none of these, or the last two alike (the message asks for the grid),
            or is not that of `grid`.
    """
    # Not dict(): torch hangs on what it gives the versions that layers were saved by.
    resampled = copy.copy(state_dict)
    # What somebody has put in its place takes the weights it was saved with.
    if not isinstance(model.stem, PatchEmbedding):
        return resampled
    embedding, kernel_size = resampled.get("stem.proj.weight"), model.stem.kernel_size
    if embedding is not None and embedding.ndim == 4 and embedding.shape[2:] != kernel_size:
        resampled["stem.proj.weight"] = resample_patch_embed(embedding, list(kernel_size))
    new_grid = model.stem.grid_size
    if new_grid is None:
        return resampled
    # What is missing, or computed from other parameters, is left to whoever loads the weights.
    own: dict[str, dict[str, Tensor]] = {}
    told: list[Grid] = []
    for name, layer, _, at in grid_bound_layers(model.blocks, new_grid, new_grid):
        keys = {key: f"{name}.{key}" for key in layer.grid_parameters}
        if all(key in state_dict for key in keys.values()):
            own[name] = {key: state_dict[full] for key, full in keys.items()}
            if at == new_grid:
                told.append(layer.trained_grid(own[name]))
    if grid is None and told:
        grid = _trained_grid(told[0], new_grid)
    for name, layer, old, new in grid_bound_layers(model.blocks, grid or new_grid, new_grid):
        if name in own and old != new:
            changed = layer.resampled(own[name], old, new)
            resampled.update({f"{name}.{key}": value for key, value in changed.items()})
    return resampled


def grid_bound_layers(blocks: nn.Sequential, grid: Grid, new_grid: Grid) -> Iterator[tuple[str, GridBound, Grid, Grid]]:
    """Every layer with weights tied to positions: its name in the model, itself, its grids.

    Args:
        blocks: the model's blocks.
        grid: the first block's grid.
        new_grid: another one; both are halved wherever the blocks halve the map.
    """
    for index, block in enumerate(blocks):
        if isinstance(block, PatchDownsampling | PatchMerging):
            grid, new_grid = (tuple((size + 1) // 2 for size in sizes) for sizes in (grid, new_grid))
        for name, layer in block.named_modules(prefix=f"blocks.{index}"):
            if isinstance(layer, GridBound):
                yield name, layer, grid, new_grid


def _trained_grid(known: Grid, new_grid: Grid) -> Grid:
    if len(known) == 2:
        return known
    (tokens,) = known
    return new_grid if tokens == math.prod(new_grid) else guess_grid(tokens, like=new_grid)
