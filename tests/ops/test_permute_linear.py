import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch.autograd import gradcheck, gradgradcheck

from allmlp.layers import PermuteMLP
from allmlp.ops import permute_linear, permute_linear_reference
from tests.compilers import need_to_know_the_compiler
from tests.tolerances import assert_close

AXES = ("height", "width")
# (map, segments)
SIZES = [((2, 3, 2, 8), 4), ((1, 2, 3, 6), 1), ((2, 1, 4, 3), 3)]


def inputs(shape, segments, axis) -> list[Tensor]:
    numbers = shape[AXES.index(axis) + 1] * shape[-1] // segments
    shapes = (shape, (numbers, numbers), (numbers,))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def loop(x: Tensor, weight: Tensor, bias: Tensor, segments: int, axis: str) -> Tensor:
    """Each segment's numbers along the axis through the linear map, one after the other."""
    batch, height, width, channels = x.shape
    out, size = torch.zeros_like(x), channels // segments
    for b in range(batch):
        for own in (slice(n * size, (n + 1) * size) for n in range(segments)):
            for k in range(width if axis == "height" else height):
                place = (b, slice(None), k, own) if axis == "height" else (b, k, slice(None), own)
                numbers = x[place]
                out[place] = (weight @ numbers.flatten() + bias).view_as(numbers)
    return out


@pytest.mark.parametrize("function", [permute_linear, permute_linear_reference])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize(("shape", "segments"), SIZES, ids=str)
def test_equals_a_loop_over_segments(function, axis, shape, segments) -> None:
    used = [x.detach() for x in inputs(shape, segments, axis)]
    assert_close(function(*used, segments, axis), loop(*used, segments, axis))


@pytest.mark.parametrize("axis", AXES)
def test_first_and_second_derivatives(axis) -> None:
    used = inputs((1, 2, 3, 4), 2, axis)
    assert gradcheck(lambda *x: permute_linear(*x, 2, axis), used)
    assert gradgradcheck(lambda *x: permute_linear(*x, 2, axis), used)


@pytest.mark.parametrize("axis", AXES)
def test_bias_may_be_absent(axis) -> None:
    x, weight, _ = (x.detach() for x in inputs((2, 3, 2, 8), 4, axis))
    assert_close(permute_linear(x, weight, None, 4, axis), permute_linear_reference(x, weight, None, 4, axis))


@pytest.mark.parametrize(
    ("axis", "dtype", "autocast", "gradients"),
    [
        ("height", torch.float32, False, False),
        ("width", torch.float32, True, False),
        ("height", torch.bfloat16, False, False),
        ("width", torch.bfloat16, False, False),
        ("height", torch.bfloat16, False, True),
        ("width", torch.float16, False, False),
    ],
    ids=str,
)
def test_compiled(axis, dtype, autocast, gradients, unchecked) -> None:
    graphs: list[str] = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return aot_eager(graph, inputs)

    torch.compiler.reset()
    compiled = torch.compile(permute_linear, backend=backend, fullgraph=True, dynamic=True)
    with torch.set_grad_enabled(gradients), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for batch in (2, 5):
            x, weight, bias = (x.detach().to(dtype) for x in inputs((batch, 3, 2, 8), 4, axis))
            y = compiled(x, weight, bias, 4, axis)
            assert y.dtype == (torch.bfloat16 if autocast else dtype)
            assert_close(y, permute_linear_reference(x, weight, bias, 4, axis))
    need_to_know_the_compiler()
    assert ("allmlp" in graphs[0]) == (y.element_size() == 2 and not gradients)


def test_export_has_torch_operators_alone() -> None:
    layer = PermuteMLP(8, (3, 2), 4).bfloat16().eval()
    with torch.no_grad():
        exported = torch.export.export(layer, (torch.randn(2, 3, 2, 8, dtype=torch.bfloat16),))
    assert "allmlp" not in str(exported.graph)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize(("shape", "segments"), SIZES, ids=str)
def test_operator(axis, shape, segments) -> None:
    x, weight, bias = (x.detach().bfloat16() for x in inputs(shape, segments, axis))
    torch.library.opcheck(torch.ops.allmlp.permute_linear_by_copies.default, (x, weight, bias, segments, axis))


def test_unknown_axis_is_refused() -> None:
    with pytest.raises(ValueError, match="axis must be one of height, width, got 'depth'"):
        permute_linear(torch.zeros(1, 2, 2, 4), torch.zeros(4, 4), None, 2, "depth")
