"""The models under torch's tracers: compile, export, ONNX, fx."""

import copy
import io
import warnings

import onnx
import pytest
import timm
import torch
from onnx.reference import ReferenceEvaluator
from torch.export import Dim
from torchvision.models.feature_extraction import create_feature_extractor

from tests.tolerances import assert_close
from tests.vision.nano import ANY_SIZE, NANO, shallow_model

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(params=NANO)
def name(request) -> str:
    return request.param


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32)


def free_sizes(name: str) -> dict[int, Dim]:
    """The dimensions that an exported model leaves open: the batch, and any image size where the family takes it."""
    if name in ANY_SIZE:
        # More than one position in the last map, whose size an exporter takes for fixed otherwise.
        return {0: Dim("batch"), 2: Dim("height", min=9, max=4096), 3: Dim("width", min=9, max=4096)}
    return {0: Dim("batch")}


def other_inputs(name: str) -> list[torch.Tensor]:
    sizes = [(1, 32, 32), (5, 32, 32)]
    if name in ANY_SIZE:
        # Odd sizes, sizes that no stage divides, wide and high.
        sizes += [(3, 37, 50), (1, 64, 9), (2, 33, 34)]
    return [torch.randn(batch, 3, height, width) for batch, height, width in sizes]


def test_training_step_compiles_as_one_graph(name, images) -> None:
    torch._dynamo.reset()
    model = shallow_model(name).train()
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    out = compiled(images)
    out.square().sum().backward()
    expected = model(images)
    expected.square().sum().backward()
    assert_close(out, expected)
    largest = max(reference.grad.abs().max() for reference in model.parameters())
    for parameter, reference in zip(twin.parameters(), model.parameters(), strict=True):
        # Some gradients are nothing but rounding: a later norm takes out what the parameter adds.
        scale = reference.grad.abs().max().clamp(min=1e-3 * largest)
        assert_close(parameter.grad / scale, reference.grad / scale)


def test_exports_with_free_sizes_and_on_to_onnx(name, images) -> None:
    model = shallow_model(name)
    program = torch.export.export(model, (images,), dynamic_shapes=(free_sizes(name),))
    exported = program.module()
    onnx = ReferenceEvaluator(torch.onnx.export(program, verbose=False).model_proto)
    (input_name,) = onnx.input_names
    for x in other_inputs(name):
        expected = model(x)
        torch.testing.assert_close(exported(x), expected)
        (out,) = onnx.run(None, {input_name: x.numpy()})
        assert_close(torch.from_numpy(out), expected)


def test_symbolic_trace_with_timms_leaves(name, images) -> None:
    model = shallow_model(name)
    traced = create_feature_extractor(
        model,
        return_nodes=["head", "blocks.0"],
        tracer_kwargs={
            "leaf_modules": timm.models.get_notrace_modules(),
            "autowrap_functions": timm.models.get_notrace_functions(),
            "param_shapes_constant": True,
        },
    )
    out = traced(images)
    torch.testing.assert_close(out["head"], model(images), rtol=0, atol=0)
    _, maps = model.forward_intermediates(images, [0], output_fmt="NHWC")
    torch.testing.assert_close(out["blocks.0"], maps[0], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.")
def test_a_traced_model_has_gradients(name, images) -> None:
    model = shallow_model(name)
    with warnings.catch_warnings():
        # Of what a trace takes for fixed, and that it is deprecated; many still use it.
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, images, check_trace=False)
    out = traced(images.requires_grad_())
    torch.testing.assert_close(out, model(images))
    out.sum().backward()
    assert images.grad.abs().sum() > 0
    saved = io.BytesIO()
    torch.jit.save(traced, saved)
    saved.seek(0)
    torch.testing.assert_close(torch.jit.load(saved)(images), out)


def test_traces_hold_at_other_sizes(name, images) -> None:
    model = shallow_model(name)
    with warnings.catch_warnings():
        # Of what a trace takes for fixed, and that it is deprecated; many still use it.
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, images, check_trace=False)
    for x in other_inputs(name):
        torch.testing.assert_close(traced(x), model(x))


@pytest.mark.parametrize("shift_size", [3, 5, 7])
def test_axial_shifts_through_the_exporter_by_tracing(shift_size: int, images) -> None:
    model = shallow_model("asmlp_nano_patch2_32", shift_size=shift_size)
    file = io.BytesIO()
    with warnings.catch_warnings():
        # Likewise.
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (images,), file, dynamo=False, input_names=["images"])
    (out,) = ReferenceEvaluator(onnx.load_from_string(file.getvalue())).run(None, {"images": images.numpy()})
    assert_close(torch.from_numpy(out), model(images))
