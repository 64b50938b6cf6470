"""`allmlp.optimize`: the fastest of the equivalent forms that this machine can run."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from allmlp.deploy.engines import ENGINES, Runner, dtype_name
from allmlp.errors import UserError, nearest
from allmlp.ops import products
from allmlp.timing import Timing, time_in_turn

# Largest deviation from the original's output, relative to its largest number.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.int8: 0.25}
_ROUNDS = 5
_CLOSE = 1.2  # times as long as the fastest: on a busy machine it could be the fastest next time


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A form that was tried.

    Attributes:
        engine: what runs it.
        milliseconds: median time of a call, None where it cannot be used.
        difference: largest deviation from the original's output over its largest number.
        reason: why it cannot be used, None where it can.
    """

    engine: str
    milliseconds: float | None = None
    difference: float | None = None
    reason: str | None = None


class OptimizedModel(nn.Module):
    """A network in its fastest form. Made by `optimize`; for inference with inputs of one shape.

    Attributes:
        engine: what runs it.
        dtype: what it computes in.
        candidates: every form that was tried, with its time.
    """

    def __init__(
        self,
        run: Runner,
        engine: str,
        dtype: torch.dtype,
        example: Tensor,
        candidates: tuple[Candidate, ...],
    ) -> None:
        super().__init__()
        self.engine = engine
        self.dtype = dtype
        self.candidates = candidates
        self._run = run
        self._shape, self._input_dtype, self._device = example.shape, example.dtype, example.device

    def forward(self, x: Tensor) -> Tensor:
        """The network's output, typed like its input.

        Raises:
            ValueError: for an input of another shape, dtype or device than the example's.
        """
        if (x.shape, x.dtype, x.device) != (self._shape, self._input_dtype, self._device):
            raise ValueError(
                f"this form was made for inputs like {_describe(self._shape, self._input_dtype, self._device)}, "
                f"got {_describe(x.shape, x.dtype, x.device)}; call optimize with an example of that kind"
            )
        return self._run(x.contiguous()).to(x.dtype)

    def extra_repr(self) -> str:
        return f"engine={self.engine!r}, dtype={dtype_name(self.dtype)}"


def optimize(
    model: nn.Module, example_inputs: Tensor | tuple[Tensor], *, dtype: torch.dtype | None = None, engine: str = "auto"
) -> OptimizedModel:
    """The fastest equivalent form of a network on this machine, its output checked against the original's.

    Every engine that works here (torch as it is, torch's compiler, OpenVINO and ONNX Runtime where
    they are installed) is given the network, must reproduce its output, and is timed in turn with the others, twice
    where others are close to the fastest. Outputs may differ by 1e-4 of the largest number in float32, by 0.05 in
    bfloat16 and 0.25 in int8.

    Args:
        model: a network of one input; it is left as it is.
        example_inputs: an input as the form will be given them: same shape, float32, same device.
        dtype: `torch.bfloat16` has the form compute in bfloat16, save on a CPU without instructions for it, where
            that gains no time; `torch.int8` in int8 (OpenVINO with nncf), for which the example is what
            activations' ranges are taken from: give it inputs as they will come, and evaluate the form. Otherwise it
            computes in float32.
        engine: `"auto"`, or the engine to take: `"eager"`, `"inductor"`, `"openvino"`, `"onnxruntime"`.

    Returns:
        The form, for inference; `candidates` tells what was tried.

    Raises:
        UserError: if the example or the dtype cannot be used, or the named engine cannot work here, with the reason.
        RuntimeError: if the named engine computes something else.
    """
    example = _checked_example(example_inputs)
    dtype = torch.float32 if dtype is None else dtype
    if dtype not in TOLERANCES:
        raise UserError(f"dtype must be one of {', '.join(map(str, TOLERANCES))}, got {dtype}")
    if example.device.type == "cpu" and dtype in products.WITHOUT_INSTRUCTIONS:
        dtype = torch.float32
    known = ("auto", *ENGINES)
    if engine not in known:
        raise UserError(f"engine must be one of {', '.join(known)}, got {engine!r}.{nearest(engine, known)}")
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            expected = model(example)
        runners: dict[str, Runner] = {}
        tried: dict[str, Candidate] = {}
        for name in ENGINES if engine == "auto" else (engine,):
            try:
                run = ENGINES[name](model, example, dtype)
                difference = _difference(run(example), expected)
            except Exception as reason:
                # Whatever an engine cannot do with a network, the others may: the reason is kept with the candidate.
                if engine != "auto":
                    raise
                tried[name] = Candidate(engine=name, reason=f"{type(reason).__name__}: {reason}".partition("\n")[0])
                continue
            if difference <= TOLERANCES[dtype]:
                runners[name] = run
                tried[name] = Candidate(engine=name, difference=difference)
            else:
                reason = f"its output is {difference:.1e} off, more than {TOLERANCES[dtype]:.0e}"
                tried[name] = Candidate(engine=name, difference=difference, reason=reason)
    finally:
        model.train(training)
    if not runners:
        raise RuntimeError("; ".join(f"{name}: {candidate.reason}" for name, candidate in tried.items()))
    times = _times(runners, example)
    fastest = min(times, key=lambda name: times[name].ratio)
    close = {name: run for name, run in runners.items() if times[name].ratio <= _CLOSE * times[fastest].ratio}
    if len(close) > 1:
        again = _times(close, example)
        fastest = min(again, key=lambda name: again[name].ratio)
        times |= again
    candidates = tuple(
        Candidate(
            engine=name,
            milliseconds=times[name].milliseconds if name in times else None,
            difference=candidate.difference,
            reason=candidate.reason,
        )
        for name, candidate in tried.items()
    )
    return OptimizedModel(runners[fastest], fastest, dtype, example, candidates)


def _times(runners: dict[str, Runner], example: Tensor) -> dict[str, Timing]:
    return time_in_turn({name: lambda run=run: run(example) for name, run in runners.items()}, rounds=_ROUNDS)


def _checked_example(example_inputs: Tensor | tuple[Tensor]) -> Tensor:
    example = example_inputs
    if isinstance(example, tuple | list) and len(example) == 1:
        example = example[0]
    if not isinstance(example, Tensor):
        raise UserError(f"example_inputs must be one tensor, got {type(example_inputs).__name__}")
    if example.dtype != torch.float32:
        raise UserError(
            f"the example must be float32, got {dtype_name(example.dtype)}; name dtype= for what to compute in"
        )
    return example.detach().contiguous()


def _difference(got: Tensor, expected: Tensor) -> float:
    if got.shape != expected.shape:
        return float("inf")
    return ((got.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


def _describe(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> str:
    return f"{dtype_name(dtype)} {' × '.join(map(str, shape))} on {device}"
