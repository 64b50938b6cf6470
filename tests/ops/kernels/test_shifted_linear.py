from functools import partial

import pytest
import torch
from torch import Tensor

from allmlp.ops import (
    axial_shift_linear,
    axial_shift_linear_reference,
    spatial_shift_linear,
    spatial_shift_linear_reference,
)
from allmlp.ops.kernels import shifted_linear as kernels
from tests.ops.kernels.parity import DEVICE, DTYPES, assert_matches, poisoned_outside
from tests.tolerances import assert_close

# (map, outputs): several tiles and a rest either way, groups that end inside a tile, offsets beyond the map, one row,
# fewer channels than groups, one pixel.
SIZES = [((2, 5, 3, 37), 19), ((1, 2, 9, 20), 33), ((3, 1, 4, 3), 5), ((1, 1, 1, 4), 1)]


def axial(shift_size, axis):
    fused = partial(axial_shift_linear, shift_size=shift_size, axis=axis, backend="triton")
    return fused, partial(axial_shift_linear_reference, shift_size=shift_size, axis=axis)


def spatial(order):
    fused = partial(spatial_shift_linear, order=order, backend="triton")
    return fused, partial(spatial_shift_linear_reference, order=order)


ONE_OF_EACH = {"axial": axial(5, "width"), "spatial": spatial("width_first")}
SHIFTS = ONE_OF_EACH | {
    "axial, none": axial(1, "width"),
    "axial, short": axial(3, "height"),
    "axial, long": axial(9, "height"),
    "spatial, other order": spatial("height_first"),
}
every_shift = pytest.mark.parametrize(("fused", "reference"), SHIFTS.values(), ids=SHIFTS)
each_shift = pytest.mark.parametrize(("fused", "reference"), ONE_OF_EACH.values(), ids=ONE_OF_EACH)


def inputs(shape, outputs) -> list[Tensor]:
    return [torch.randn(shape), torch.randn(outputs, shape[-1]) / shape[-1] ** 0.5, torch.randn(outputs)]


@every_shift
@pytest.mark.parametrize(("shape", "outputs"), SIZES, ids=str)
def test_output_and_gradients_follow_the_float64_reference(fused, reference, shape, outputs, small_tiles) -> None:
    assert_matches(fused, reference, inputs(shape, outputs), torch.float32)


@each_shift
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_of_a_real_machine(fused, reference, dtype) -> None:
    assert_matches(fused, reference, inputs((2, 5, 7, 70), 133), dtype)


LAYOUTS = {
    "half of the channels": lambda x, weight, bias: (x.chunk(2, dim=-1)[1], weight[:, ::2], bias),
    "channels first": lambda x, weight, bias: (x.permute(0, 3, 1, 2), weight[:, :5], bias),
    "expanded": lambda x, weight, bias: (x[:1].expand(3, -1, -1, -1), weight, bias[:1].expand(len(bias))),
}


@each_shift
@pytest.mark.parametrize("view", LAYOUTS.values(), ids=LAYOUTS)
def test_any_memory_layout(fused, reference, view, small_tiles) -> None:
    used = inputs((2, 3, 5, 34), 21)
    assert_matches(lambda *x: fused(*view(*x)), lambda *x: reference(*view(*x)), used, torch.float32)


@each_shift
def test_nothing_outside_is_read(fused, reference, small_tiles) -> None:
    x, weight, bias = (x.to(DEVICE) for x in inputs((2, 3, 5, 19), 7))
    leaves = [poisoned_outside(x).requires_grad_() for x in (x, weight, bias)]
    out = fused(*leaves)
    assert_close(out, reference(x.double(), weight.double(), bias.double()))
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out, leaves, poisoned_outside(out.detach())))


@each_shift
def test_without_bias(fused, reference, small_tiles) -> None:
    x, weight, _ = inputs((2, 3, 5, 20), 7)
    assert_matches(lambda *x: fused(*x, None), lambda *x: reference(*x, None), [x, weight], torch.float32)


@each_shift
def test_only_the_gradients_asked_for_are_computed(fused, reference, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_weight_grad", "_shift_adjoint"):
        monkeypatch.setattr(kernels, name, lambda *args: pytest.fail("frozen"))
    x, weight, bias = (x.to(DEVICE) for x in inputs((1, 2, 3, 8), 4))
    bias.requires_grad_()
    fused(x, weight, bias).sum().backward()
    assert_close(bias.grad, torch.full((4,), 6.0, device=DEVICE))


@each_shift
def test_the_shifted_map_is_not_kept(fused, reference) -> None:
    x, weight, bias = (x.to(DEVICE).requires_grad_() for x in inputs((1, 2, 3, 8), 4))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        fused(x, weight, bias)
    assert {tensor.data_ptr() for tensor in kept} == {x.data_ptr(), weight.data_ptr()}


# torch's own check looks at the gradient of a tensor that has none.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("clamp", [False, True])
def test_custom_operators(clamp, small_tiles) -> None:
    x, weight, bias = (x.to(DEVICE).requires_grad_() for x in inputs((2, 3, 2, 6), 4))
    shift = ([0, 3], [1, 0], [0, -1], clamp)
    torch.library.opcheck(kernels.shifted_linear, (x, weight, bias, *shift), atol=1e-4, rtol=1e-4)
    grad = torch.randn(2, 3, 2, 4, device=DEVICE)
    torch.library.opcheck(kernels._weight_grad, (grad, x.detach(), *shift))
    torch.library.opcheck(kernels._shift_adjoint, (x.detach(), *shift))


@each_shift
def test_under_autocast(fused, reference) -> None:
    leaves = [x.to(DEVICE).requires_grad_() for x in inputs((2, 3, 5, 8), 6)]
    with torch.autocast(DEVICE, torch.bfloat16):
        out = fused(*leaves)
    assert out.dtype == torch.bfloat16
    assert_close(out, reference(*leaves).double())
    for x, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert grad.dtype == x.dtype == torch.float32


@each_shift
def test_compiled_without_a_break(fused, reference, small_tiles, unchecked) -> None:
    leaves = [x.to(DEVICE).requires_grad_() for x in inputs((2, 3, 5, 8), 6)]
    out, expected = torch.compile(fused, fullgraph=True, backend="aot_eager")(*leaves), fused(*leaves)
    assert_close(out, expected.double())
    grads, expected_grads = (torch.autograd.grad(y.square().sum(), leaves) for y in (out, expected))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert_close(grad, expected_grad.double())


@each_shift
def test_nothing_to_map(fused, reference) -> None:
    x, weight, bias = (x.to(DEVICE).requires_grad_() for x in inputs((0, 3, 5, 8), 6))
    out = fused(x, weight, bias)
    assert out.shape == (0, 3, 5, 6)
    assert not any(grad.any() for grad in torch.autograd.grad(out.sum(), (x, weight, bias)))


@each_shift
def test_parameters_must_fit(fused, reference, unchecked) -> None:
    x, weight, bias = (x.to(DEVICE) for x in inputs((1, 3, 5, 8), 6))
    with pytest.raises(ValueError, match=r"weight must be shaped \(6, 8\), got \(6, 7\)"):
        fused(x, weight[:, 1:], bias)
    with pytest.raises(ValueError, match=r"bias must be shaped \(6,\), got \(5,\)"):
        fused(x, weight, bias[1:])


@each_shift
def test_what_the_kernels_cannot_run_is_refused(fused, reference) -> None:
    with pytest.raises(ValueError, match=r"cannot run .*_shift_linear: the kernels read .* not float64"):
        fused(*(x.double() for x in inputs((1, 3, 5, 8), 6)))
