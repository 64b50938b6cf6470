from functools import partial

import pytest
import torch
from torch import Tensor

from allmlp.ops import permute_linear, permute_linear_reference
from allmlp.ops.kernels import permute_linear as kernels
from tests.ops.kernels.parity import DEVICE, DTYPES, assert_matches, poisoned_outside
from tests.tolerances import assert_close

AXES = ("height", "width")
# (map, segments): several tiles and a rest either way, one channel a segment, one segment, one pixel.
SIZES = [((2, 5, 7, 36), 9), ((3, 4, 19, 6), 6), ((1, 17, 2, 5), 1), ((1, 1, 1, 4), 2)]


def operators(segments, axis):
    fused = partial(permute_linear, segments=segments, axis=axis, backend="triton")
    return fused, partial(permute_linear_reference, segments=segments, axis=axis)


def inputs(shape, segments, axis) -> list[Tensor]:
    numbers = shape[AXES.index(axis) + 1] * shape[-1] // segments
    return [torch.randn(shape), torch.randn(numbers, numbers) / numbers**0.5, torch.randn(numbers)]


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize(("shape", "segments"), SIZES, ids=str)
def test_output_and_gradients_follow_the_float64_reference(shape, segments, axis, small_tiles) -> None:
    assert_matches(*operators(segments, axis), inputs(shape, segments, axis), torch.float32)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_of_a_real_machine(dtype, axis) -> None:
    assert_matches(*operators(8, axis), inputs((2, 5, 6, 216), 8, axis), dtype)


LAYOUTS = {
    "half of the channels": lambda x, weight, bias: (x.chunk(2, dim=-1)[1], weight, bias),
    "transposed": lambda x, weight, bias: (x.transpose(1, 2)[..., :8], weight.t(), bias),
    "expanded": lambda x, weight, bias: (x[:1, ..., :8].expand(3, -1, -1, -1), weight, bias[:1].expand(len(bias))),
}


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("view", LAYOUTS.values(), ids=LAYOUTS)
def test_any_memory_layout(view, axis, small_tiles) -> None:
    fused, reference = operators(4, axis)
    used = [torch.randn(2, 5, 5, 16), *inputs((2, 5, 5, 8), 4, axis)[1:]]
    assert_matches(lambda *x: fused(*view(*x)), lambda *x: reference(*view(*x)), used, torch.float32)


@pytest.mark.parametrize("axis", AXES)
def test_nothing_outside_is_read(axis, small_tiles) -> None:
    fused, reference = operators(4, axis)
    x, weight, bias = (x.to(DEVICE) for x in inputs((2, 5, 7, 12), 4, axis))
    leaves = [poisoned_outside(x).requires_grad_() for x in (x, weight, bias)]
    out = fused(*leaves)
    assert_close(out, reference(x.double(), weight.double(), bias.double()))
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out, leaves, poisoned_outside(out.detach())))


@pytest.mark.parametrize("axis", AXES)
def test_without_bias(axis, small_tiles) -> None:
    fused, reference = operators(4, axis)
    x, weight, _ = inputs((2, 5, 3, 8), 4, axis)
    assert_matches(lambda *x: fused(*x, None), lambda *x: reference(*x, None), [x, weight], torch.float32)


def test_only_the_gradients_asked_for_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_weight_grad", lambda *args: pytest.fail("frozen"))
    x, weight, bias = (x.to(DEVICE) for x in inputs((1, 3, 2, 8), 4, "height"))
    bias.requires_grad_()
    operators(4, "height")[0](x, weight, bias).sum().backward()
    assert_close(bias.grad, torch.full((6,), 8.0, device=DEVICE))


def test_no_permutation_is_kept() -> None:
    x, weight, bias = (x.to(DEVICE).requires_grad_() for x in inputs((1, 3, 2, 8), 4, "height"))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        operators(4, "height")[0](x, weight, bias)
    assert {tensor.data_ptr() for tensor in kept} == {x.data_ptr(), weight.data_ptr()}


# torch's own check looks at the gradient of a tensor that has none.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("axis", AXES)
def test_custom_operators(axis, small_tiles) -> None:
    x, weight, bias = (x.to(DEVICE).requires_grad_() for x in inputs((2, 3, 5, 4), 2, axis))
    torch.library.opcheck(kernels.permute_linear, (x, weight, bias, 2, axis), atol=1e-4, rtol=1e-4)
    torch.library.opcheck(kernels._weight_grad, (torch.randn_like(x), x.detach(), 2, axis))


def test_under_autocast() -> None:
    fused, reference = operators(4, "width")
    leaves = [x.to(DEVICE).requires_grad_() for x in inputs((2, 3, 5, 8), 4, "width")]
    with torch.autocast(DEVICE, torch.bfloat16):
        out = fused(*leaves)
    assert out.dtype == torch.bfloat16
    assert_close(out, reference(*leaves).double())
    for x, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert grad.dtype == x.dtype == torch.float32


@pytest.mark.parametrize("axis", AXES)
def test_compiled_without_a_break(axis, small_tiles, unchecked) -> None:
    fused, _ = operators(4, axis)
    leaves = [x.to(DEVICE).requires_grad_() for x in inputs((2, 3, 5, 8), 4, axis)]
    out, expected = torch.compile(fused, fullgraph=True, backend="aot_eager")(*leaves), fused(*leaves)
    assert_close(out, expected.double())
    grads, expected_grads = (torch.autograd.grad(y.square().sum(), leaves) for y in (out, expected))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert_close(grad, expected_grad.double())


def test_parameters_must_fit(unchecked) -> None:
    fused, _ = operators(4, "width")
    x, weight, bias = (x.to(DEVICE) for x in inputs((1, 3, 5, 8), 4, "width"))
    with pytest.raises(ValueError, match=r"weight must be shaped \(10, 10\), got \(9, 10\)"):
        fused(x, weight[1:], bias)
    with pytest.raises(ValueError, match=r"bias must be shaped \(10,\), got \(9,\)"):
        fused(x, weight, bias[1:])


def test_what_the_kernels_cannot_run_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot run permute_linear: the kernels read .* not float64"):
        operators(4, "width")[0](*(x.double() for x in inputs((1, 3, 5, 8), 4, "width")))
