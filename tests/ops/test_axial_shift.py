from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch.autograd import gradcheck, gradgradcheck

from allmlp.layers import AxialShift
from allmlp.ops import axial_shift, axial_shift_linear, axial_shift_linear_reference, axial_shift_reference
from tests.compilers import need_to_know_the_compiler

AXES = ("height", "width")
SHIFT_SIZES = (1, 3, 5, 7, 9, 11)
# (map, channels): equal groups, unequal ones, fewer groups than offsets, offsets larger than the map, one pixel.
SHAPES = [(1, 6, 6, 15), (2, 5, 7, 12), (1, 4, 3, 4), (1, 2, 3, 22), (2, 1, 1, 9), (1, 1, 5, 8), (1, 5, 1, 3)]


def loop(x: Tensor, shift_size: int, axis: str) -> Tensor:
    """The shift, one element at a time, from the paper's words."""
    batch, height, width, channels = x.shape
    out = torch.zeros_like(x)
    group_width = -(-channels // shift_size)
    for b, i, j, c in product(range(batch), range(height), range(width), range(channels)):
        offset = c // group_width - shift_size // 2
        source_i, source_j = (i - offset, j) if axis == "height" else (i, j - offset)
        if 0 <= source_i < height and 0 <= source_j < width:
            out[b, i, j, c] = x[b, source_i, source_j, c]
    return out


@pytest.mark.parametrize("function", [axial_shift, axial_shift_reference])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("shift_size", SHIFT_SIZES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_a_loop_over_elements(function, axis, shift_size, shape) -> None:
    x = torch.randn(shape)
    torch.testing.assert_close(function(x, shift_size, axis), loop(x, shift_size, axis), rtol=0, atol=0)


@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(1, 5), st.integers(1, 14)),
    half=st.integers(0, 6),
    axis=st.sampled_from(AXES),
)
def test_equals_a_loop_at_any_shape(shape, half, axis) -> None:
    x = torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float32).view(shape)
    torch.testing.assert_close(axial_shift(x, 2 * half + 1, axis), loop(x, 2 * half + 1, axis), rtol=0, atol=0)


def test_groups_of_the_published_model() -> None:
    """96 channels in five groups are 20, 20, 20, 20 and 16, moved by −2 to 2: not an even split."""
    columns = torch.arange(1, 8, dtype=torch.float32).view(1, 1, 7, 1).expand(1, 1, 7, 96)
    # What the middle column, 4, shows is the column it was read from.
    seen = axial_shift(columns.contiguous(), 5, "width")[0, 0, 3].tolist()
    assert seen == [6.0] * 20 + [5.0] * 20 + [4.0] * 20 + [3.0] * 20 + [2.0] * 16


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_moves_every_dtype_unchanged(dtype) -> None:
    x = torch.randn(2, 3, 5, 7).to(dtype)
    out = axial_shift(x, 5, "width")
    assert out.dtype == dtype
    torch.testing.assert_close(out, loop(x, 5, "width"), rtol=0, atol=0)


LAYOUTS = {
    "transposed": lambda x: x.permute(0, 2, 1, 3),
    "channels first": lambda x: x.permute(0, 3, 1, 2),
    "every other channel": lambda x: x[..., ::2],
    "part of the channels": lambda x: x[..., 1:6],
    "expanded": lambda x: x[:1].expand(3, -1, -1, -1),
}


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("view", LAYOUTS.values(), ids=LAYOUTS)
def test_any_memory_layout(view, axis) -> None:
    leaf = torch.randn(2, 4, 6, 8, dtype=torch.float64, requires_grad=True)
    x = view(leaf)
    assert not x.is_contiguous()
    torch.testing.assert_close(axial_shift(x, 3, axis), loop(x.detach(), 3, axis), rtol=0, atol=0)
    upstream = torch.randn_like(x)
    (grad,) = torch.autograd.grad(axial_shift(x, 3, axis), leaf, upstream)
    (expected,) = torch.autograd.grad(axial_shift_reference(x, 3, axis), leaf, upstream)
    torch.testing.assert_close(grad, expected)


# torch itself scripts its decompositions for forward derivatives.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize(("shape", "shift_size"), [((1, 1, 1, 5), 3), ((1, 3, 4, 7), 5), ((2, 2, 3, 4), 7)], ids=str)
def test_first_and_second_derivatives(shape, shift_size, axis) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: axial_shift(x, shift_size, axis), x, check_forward_ad=True)
    assert gradgradcheck(lambda x: axial_shift(x, shift_size, axis), x)
    # The shift is linear; a product makes its second derivative something to get wrong.
    assert gradgradcheck(lambda x: axial_shift(x * x, shift_size, axis), x)


def test_function_transforms() -> None:
    x = torch.randn(3, 1, 4, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(
        torch.func.vmap(lambda x: axial_shift(x, 3, "height"))(x),
        torch.stack([axial_shift(sample, 3, "height") for sample in x]),
        rtol=0,
        atol=0,
    )
    torch.testing.assert_close(
        torch.func.vmap(torch.func.grad(lambda x: axial_shift(x, 3, "height").square().sum()))(x),
        torch.stack(
            [torch.func.grad(lambda x: axial_shift_reference(x, 3, "height").square().sum())(sample) for sample in x]
        ),
    )


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled(dtype, axis, unchecked) -> None:
    graphs: list[str] = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return aot_eager(graph, inputs)

    compiled = torch.compile(lambda x: axial_shift(x.sin(), 3, axis), backend=backend, fullgraph=True, dynamic=True)
    for height in (5, 2):
        x = torch.randn(2, height, 4, 7, dtype=dtype, requires_grad=True)
        out, expected = compiled(x), axial_shift(x.sin(), 3, axis)
        assert torch.equal(out, expected)
        upstream = torch.randn_like(out)
        assert torch.equal(*(torch.autograd.grad(y, x, upstream)[0] for y in (out, expected)))
    exported = torch.export.export(AxialShift(7, 3).to(dtype), (x.detach(),))
    assert "allmlp" not in str(exported.graph)
    need_to_know_the_compiler()
    assert ("allmlp.axial_shift" in graphs[0]) == (dtype == torch.bfloat16)


# torch's own check looks at the gradient of a tensor that has none.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_operator() -> None:
    x = torch.randn(2, 3, 4, 7, requires_grad=True)
    torch.library.opcheck(torch.ops.allmlp.axial_shift.default, (x, 3, "width", 1))


@pytest.mark.parametrize("axis", AXES)
def test_linear_map_of_the_shift(axis) -> None:
    shapes = ((2, 3, 4, 7), (5, 7), (5,))
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    x, weight, bias = (x.detach() for x in inputs)
    expected = torch.einsum("oc,bhwc->bhwo", weight, loop(x, 3, axis)) + bias
    for function in (axial_shift_linear, axial_shift_linear_reference):
        torch.testing.assert_close(function(x, weight, bias, 3, axis), expected)
    assert gradcheck(lambda *x: axial_shift_linear(*x, 3, axis), inputs)
    assert gradgradcheck(lambda *x: axial_shift_linear(*x, 3, axis), inputs)


def test_linear_map_keeps_no_shifted_map() -> None:
    x, weight = torch.randn(1, 3, 4, 7, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        axial_shift_linear(x, weight, None, 3, "width")
    assert {tensor.data_ptr() for tensor in kept} == {x.data_ptr(), weight.data_ptr()}


def test_result_shares_no_memory() -> None:
    x = torch.randn(1, 3, 3, 4)
    before = x.clone()
    axial_shift(x, 1, "width").zero_()
    assert torch.equal(x, before)


@pytest.mark.parametrize("shift_size", [0, -1, 2, 4])
def test_shift_size_must_be_odd_and_positive(shift_size) -> None:
    with pytest.raises(ValueError, match=f"shift_size must be odd and positive, got {shift_size}"):
        axial_shift(torch.zeros(1, 2, 2, 4), shift_size, "width")
    with pytest.raises(ValueError, match=f"shift_size must be odd and positive, got {shift_size}"):
        axial_shift_linear(torch.zeros(1, 2, 2, 4), torch.zeros(4, 4), None, shift_size, "width")


def test_unknown_axis_is_refused() -> None:
    with pytest.raises(ValueError, match="axis must be one of height, width, got 'depth'"):
        axial_shift(torch.zeros(1, 2, 2, 4), 3, "depth")
