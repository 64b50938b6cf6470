"""What can run a network: torch as it is, torch's compiler, and inference engines that are installed."""

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.source import GlobalStateSource
from torch.utils._pytree import tree_leaves

from allmlp.errors import UserError

# Takes the network's inputs, one after another, and gives the tensors of its output in torch's order of leaves.
Runner = Callable[..., list[Tensor]]


class EngineMissingError(UserError):
    """An engine cannot work on this machine, or not with what was asked for."""


def eager(model: nn.Module, examples: tuple[Tensor, ...], dtype: torch.dtype) -> Runner:
    """torch without a compiler, in `dtype`."""
    _require_floating("eager", dtype)
    return _in_torch(copy.deepcopy(model).to(dtype), dtype)


def inductor(model: nn.Module, examples: tuple[Tensor, ...], dtype: torch.dtype) -> Runner:
    """torch's compiler."""
    _require_floating("inductor", dtype)
    on_cpu = examples[0].device.type == "cpu"
    if on_cpu:
        _require_cpp_compiler()
    options: dict[str, Any] = {"guard_filter_fn": _without_global_state}
    if on_cpu:
        # Named, they are compiled in, and a form for others is compiled anew: nothing else asks how many there are.
        options |= {**_CPU_OPTIONS, "cpp.threads": torch.get_num_threads()}
    model = copy.deepcopy(model).to(dtype)
    run = _in_torch(torch.compile(model, fullgraph=True, dynamic=False, options=options), dtype)
    # All networks of a class share one `forward`, which torch compiles for eight of them and then refuses.
    with torch._dynamo.config.patch(recompile_limit=1 << 16, accumulated_recompile_limit=1 << 16):
        run(*examples)
        # What the first call made, such as a mask that is kept, the second one reads.
        run(*examples)
    try:
        with torch._dynamo.config.patch(error_on_recompile=True):
            run(*examples)
    except torch._dynamo.exc.RecompileError as error:
        raise EngineMissingError(
            "engine 'inductor' would compile this network anew at every call: the network, or a hook on it, counts or "
            "collects something in Python"
        ) from error
    return run


def openvino(model: nn.Module, examples: tuple[Tensor, ...], dtype: torch.dtype) -> Runner:
    """OpenVINO on the CPU, computing in `dtype`.

    In int8 it is quantised by NNCF after training: weights channel by channel, activations by the range they have for
    the example, whatever has no int8 form in bfloat16 where the processor has it.
    """
    _require_cpu("openvino", examples)
    try:
        import openvino as ov
    except ImportError as error:
        raise EngineMissingError("engine 'openvino' is not installed: pip install openvino") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = ov.convert_model(torch.export.export(model, examples))
    core = ov.Core()
    precision = "f32" if dtype == torch.float32 else "bf16"
    if dtype == torch.int8:
        converted = _quantized(converted, examples)
        if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            precision = "f32"
    options = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = core.compile_model(converted, "CPU", options)

    def run(*inputs: Tensor) -> list[Tensor]:
        found = compiled([x.numpy() for x in inputs], share_inputs=True)
        return [torch.from_numpy(found[i]) for i in range(len(found))]

    return run


def onnxruntime(model: nn.Module, examples: tuple[Tensor, ...], dtype: torch.dtype) -> Runner:
    """ONNX Runtime on the CPU; its kernels compute in float32."""
    _require_cpu("onnxruntime", examples)
    if dtype != torch.float32:
        raise EngineMissingError(f"engine 'onnxruntime' computes in float32 on a CPU, not in {dtype_name(dtype)}")
    try:
        import onnxruntime as ort
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError as error:
        raise EngineMissingError("engine 'onnxruntime' needs: pip install onnxruntime onnx onnxscript") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model, examples, dynamo=True, verbose=False)
    assert program is not None
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def run(*inputs: Tensor) -> list[Tensor]:
        given = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        return [torch.from_numpy(found) for found in session.run(None, given)]

    return run


ENGINES: dict[str, Callable[[nn.Module, tuple[Tensor, ...], torch.dtype], Runner]] = {
    "eager": eager,
    "inductor": inductor,
    "openvino": openvino,
    "onnxruntime": onnxruntime,
}


# By itself it computes again, in each kernel that reads it, what takes up to 30 operations, and rounds between a
# multiplication and an addition.
_CPU_OPTIONS = {"realize_opcount_threshold": 6, "cpp.enable_floating_point_contract_flag": "fast"}


def _without_global_state(guards: Sequence[Any]) -> list[bool]:
    """Which guards torch keeps: a form is not compiled again for other threads, default dtypes or modes around a call.

    `optimize` calls every form without gradients or autocast; the rest of the global state it met when it was made.
    """
    return [not isinstance(guard.orig_guard.originating_source, GlobalStateSource) for guard in guards]


def _in_torch(network: Callable[..., Any], dtype: torch.dtype) -> Runner:
    def run(*inputs: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return tree_leaves(network(*(x.to(dtype) if x.is_floating_point() else x for x in inputs)))

    return run


def _quantized(network: Any, examples: tuple[Tensor, ...]) -> Any:
    """An OpenVINO network with the int8 products of NNCF, calibrated with the example."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import nncf
    except ImportError as error:
        raise EngineMissingError("engine 'openvino' in int8 needs: pip install nncf") from error
    nncf.set_log_level(logging.ERROR)
    # Both corrections rebuild parts of the network with a batch of one, which reshapes of exported networks refuse.
    unaltered = nncf.AdvancedQuantizationParameters(
        disable_bias_correction=True,
        smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(convolution=-1, matmul=-1),
    )
    # It draws progress bars.
    with contextlib.redirect_stdout(io.StringIO()):
        return nncf.quantize(
            network,
            nncf.Dataset([[x.numpy() for x in examples]]),
            subset_size=1,
            preset=nncf.QuantizationPreset.MIXED,
            advanced_parameters=unaltered,
        )


def _require_floating(engine: str, dtype: torch.dtype) -> None:
    if not dtype.is_floating_point:
        raise EngineMissingError(f"engine {engine!r} computes in float32 or bfloat16, not in {dtype_name(dtype)}")


def _require_cpp_compiler() -> None:
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, RuntimeError) as error:
        raise EngineMissingError(
            "engine 'inductor' needs a C++ compiler and found none: install g++ or clang, or name one in CXX"
        ) from error


def _require_cpu(engine: str, examples: tuple[Tensor, ...]) -> None:
    device = examples[0].device.type
    if device != "cpu":
        raise EngineMissingError(f"engine {engine!r} runs on a CPU here, the example lies on {device!r}")


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float32` as `float32`."""
    return str(dtype).removeprefix("torch.")
