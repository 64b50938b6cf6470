import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from allmlp.ops.resampling import guess_grid, resample_read, resample_written, resampling_matrix
from tests.tolerances import assert_close

sizes = st.integers(1, 9)
grids = st.one_of(st.tuples(sizes), st.tuples(sizes, sizes))
pairs = st.integers(1, 2).flatmap(lambda axes: st.tuples(*[st.tuples(*[sizes] * axes)] * 2))


def tokens(grid) -> int:
    return int(torch.tensor(grid).prod())


def resampled(weight, grid, new_grid):
    return resample_read(resample_written(weight, grid, new_grid), grid, new_grid)


@given(pairs)
def test_rows_sum_to_one(pair) -> None:
    matrix = resampling_matrix(*pair)
    assert matrix.shape == (tokens(pair[1]), tokens(pair[0]))
    assert_close(matrix.sum(1), torch.ones(tokens(pair[1]), dtype=torch.float64))


@given(pairs)
def test_products_keep_constants_and_row_sums(pair) -> None:
    """A constant map stays one, times what the rows of the weight summed to."""
    grid, new_grid = pair
    weight = torch.randn(tokens(grid), tokens(grid), dtype=torch.float64)
    assert_close(resample_read(weight, grid, new_grid).sum(1), weight.sum(1))
    constant_rows = weight / weight.sum(1, keepdim=True)
    new = resampled(constant_rows, grid, new_grid)
    assert_close(new.sum(1), torch.ones(tokens(new_grid), dtype=torch.float64))
    assert_close(
        resample_written(torch.full((tokens(grid),), 0.7), grid, new_grid), torch.full((tokens(new_grid),), 0.7)
    )


@given(grids)
def test_the_same_grid_gives_the_very_same_tensor(grid) -> None:
    weight = torch.randn(tokens(grid), tokens(grid))
    assert resample_written(weight, grid, grid) is weight
    assert resample_read(weight, grid, grid) is weight


@given(pairs)
def test_up_and_back_is_the_identity(pair) -> None:
    axes = [sorted(axis) for axis in zip(*pair, strict=True)]
    small, large = tuple(axis[0] for axis in axes), tuple(axis[1] for axis in axes)
    weight = torch.randn(tokens(small), tokens(small), dtype=torch.float64)
    assert_close(resampled(resampled(weight, small, large), large, small), weight)


def test_finer_grids_see_smooth_functions_as_they_are() -> None:
    """Values of a plane keep lying on it, except at the border, where there is nothing to interpolate between."""
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(8.0), indexing="ij")
    plane = (2 * rows - columns).flatten().double()
    finer = (resampling_matrix((6, 8), (12, 8)) @ plane).unflatten(0, (12, 8))
    expected = 2 * (torch.arange(12.0)[:, None] - 0.5) / 2 - torch.arange(8.0)
    assert_close(finer[4:-4], expected[4:-4].double())


def test_axes_are_resampled_each_for_itself() -> None:
    matrix = resampling_matrix((3, 5), (6, 2))
    assert_close(matrix, torch.kron(resampling_matrix((3,), (6,)), resampling_matrix((5,), (2,))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_any_dimension_and_dtype(dtype) -> None:
    weight = torch.randn(2, 4, 3).to(dtype)
    out = resample_written(weight, (2, 2), (3, 2), dim=1)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert_close(out, torch.einsum("nt,btc->bnc", resampling_matrix((2, 2), (3, 2)), weight.double()))


def test_gradients_pass_through() -> None:
    weight = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: resampled(w, (2, 2), (3, 3)), weight)


def test_grid_of_another_number_of_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="a weight for 12 tokens does not belong to a grid of 3×5"):
        resample_written(torch.randn(12), (3, 5), (4, 5))


def test_grids_are_guessed_from_the_number_of_tokens() -> None:
    assert guess_grid(196, like=(7, 14)) == (14, 14)
    assert guess_grid(48, like=(9, 12)) == (6, 8)
    assert guess_grid(98, like=(32, 64)) == (7, 14)
    assert guess_grid(64, like=(5, 5)) == (8, 8)
    with pytest.raises(ValueError, match=r"made for 64 tokens, which is 4×16 and 8×8 alike: name the grid"):
        guess_grid(64, like=(8, 32))
    with pytest.raises(ValueError, match=r"made for 12 tokens, .* square .* 8×8: name the grid .*grid=\(rows, col"):
        guess_grid(12, like=(8, 8))
