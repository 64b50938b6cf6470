"""Weights of token mixing at another grid of tokens.

A weight that reads or writes tokens is a function of positions in the image. At another grid it becomes the product
that brings the new grid's tokens to the old one, mixes them as before, and brings the result to the new grid,
`W' = U W D`. `U` is bicubic interpolation where an axis grows and its pseudo-inverse where it shrinks; `D` is the same
from the new grid to the old. The rows of both sum to one, so a constant stays one, and `D U` is the identity where the
new grid is the finer one. docs/resolution.md compares the choices.
"""

import math
from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Grid = tuple[int, ...]


@cache
def _interpolation(size: int, new_size: int) -> Float[Tensor, "new old"]:
    """Bicubic interpolation of `size` equidistant values to a finer grid, cell centres aligned."""
    basis = torch.eye(size, dtype=torch.float64, device="cpu")[None, None]
    return F.interpolate(basis, (new_size, size), mode="bicubic", antialias=True)[0, 0]


@cache
def _axis(size: int, new_size: int) -> Float[Tensor, "new old"]:
    if size <= new_size:
        return _interpolation(size, new_size)
    return torch.linalg.pinv(_interpolation(new_size, size))


def resampling_matrix(grid: Grid, new_grid: Grid) -> Float[Tensor, "new old"]:
    """The matrix that brings values on `grid`, in row-major order, to `new_grid`; float64, on the CPU.

    Its rows sum to one. Along an axis that grows it interpolates bicubically; along one that shrinks it is the
    pseudo-inverse of that, the values whose interpolation comes closest.

    Args:
        grid: sizes of the axes.
        new_grid: as many sizes.
    """
    matrix = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    for size, new_size in zip(grid, new_grid, strict=True):
        matrix = torch.kron(matrix, _axis(size, new_size))
    return matrix


def resample_written(weight: Tensor, grid: Grid, new_grid: Grid, dim: int = 0) -> Tensor:
    """Resample the dimension of tokens that a weight writes: `U W`, for a bias `U b`.

    Args:
        weight: any shape and floating dtype.
        grid: the grid of the tokens along `dim`.
        new_grid: the grid wanted.
        dim: the dimension of the tokens written.

    Returns:
        The weight with `prod(new_grid)` entries along `dim`; `weight` itself for the same grid.
    """
    return _along(weight, grid, new_grid, dim, resampling_matrix(grid, new_grid))


def resample_read(weight: Tensor, grid: Grid, new_grid: Grid, dim: int = -1) -> Tensor:
    """Resample the dimension of tokens that a weight reads: `W D`, which keeps the sum over that dimension.

    Arguments and result as for `resample_written`.
    """
    return _along(weight, grid, new_grid, dim, resampling_matrix(new_grid, grid).T)


def _along(weight: Tensor, grid: Grid, new_grid: Grid, dim: int, matrix: Tensor) -> Tensor:
    if weight.shape[dim] != math.prod(grid):
        raise ValueError(f"a weight for {weight.shape[dim]} tokens does not belong to a grid of {format_grid(grid)}")
    if grid == new_grid:
        return weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    matrix = matrix.to(device=weight.device, dtype=dtype)
    return torch.tensordot(weight.to(dtype), matrix, ([dim], [1])).movedim(-1, dim).to(weight.dtype).contiguous()


def guess_grid(tokens: int, like: Grid) -> Grid:
    """The grid of `tokens` tokens: a square, or of the proportions of `like`.

    Raises:
        ValueError: if it is neither, or may be either; the message asks for the grid.
    """
    divisor = math.gcd(*like)
    fitting = {grid for unit in ((1, 1), tuple(size // divisor for size in like)) if (grid := _scaled(unit, tokens))}
    if len(fitting) == 1:
        return fitting.pop()
    may_be = " and ".join(map(format_grid, sorted(fitting)))
    raise ValueError(
        f"the weights were made for {tokens} tokens, which is "
        + (f"{may_be} alike" if fitting else f"neither a square nor of the proportions of {format_grid(like)}")
        + ": name the grid they were trained on, "
        "allmlp.vision.resolution.resample_state_dict(weights, model, grid=(rows, columns))"
    )


def _scaled(unit: Grid, tokens: int) -> Grid | None:
    """The multiple of a grid that has so many tokens."""
    scale = math.isqrt(tokens // math.prod(unit))
    return tuple(scale * size for size in unit) if scale * scale * math.prod(unit) == tokens else None


def format_grid(grid: Sequence[int]) -> str:
    """Such as 14×14."""
    return "×".join(str(size) for size in grid)
