"""`allmlp.optimize`: the fastest of the equivalent forms that this machine can run."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

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
        examples: tuple[Tensor, ...],
        names: tuple[str, ...],
        output: "_Output",
        candidates: tuple[Candidate, ...],
    ) -> None:
        super().__init__()
        self.engine = engine
        self.dtype = dtype
        self.candidates = candidates
        self._run, self._output, self._names = run, output, names
        self._kinds = tuple(map(_kind, examples))

    def forward(self, *inputs: Tensor, **named: Tensor) -> Any:
        """The network's output, made and typed as the network's own.

        Raises:
            TypeError: for other inputs than the example's: more, fewer, by other names, or no tensors.
            ValueError: for an input of another shape, dtype or device than the example's.
        """
        if self._names:
            if inputs or named.keys() != set(self._names):
                got = [*("an input without a name" for _ in inputs), *named]
                raise TypeError(f"this form takes {', '.join(self._names)} by name, got {', '.join(got) or 'nothing'}")
            inputs = tuple(named[name] for name in self._names)
        elif named or len(inputs) != len(self._kinds):
            got = [str(len(inputs)), *named]
            raise TypeError(f"this form takes {len(self._kinds)} inputs without names, got {', '.join(got)}")
        if others := [type(x).__name__ for x in inputs if not isinstance(x, Tensor)]:
            raise TypeError(f"this form takes tensors, got {', '.join(others)}")
        kinds = tuple(map(_kind, inputs))
        if kinds != self._kinds:
            made_for, got = ("; ".join(map(_described, each)) for each in (self._kinds, kinds))
            raise ValueError(
                f"this form was made for inputs like {made_for}, got {got}; call optimize with an example of that kind"
            )
        with _plain(inputs[0].device):
            return self._output.made_of(self._run(*map(_own, inputs)))

    def __reduce__(self) -> Any:
        raise TypeError(
            "an optimized form belongs to this process and machine: keep the model, and call optimize again"
        )

    def extra_repr(self) -> str:
        return f"engine={self.engine!r}, dtype={dtype_name(self.dtype)}"


Examples = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


def optimize(
    model: nn.Module, example_inputs: Examples, *, dtype: torch.dtype | None = None, engine: str = "auto"
) -> OptimizedModel:
    """The fastest equivalent form of a network on this machine, its output checked against the original's.

    Every engine that works here (torch as it is, torch's compiler, OpenVINO and ONNX Runtime where
    they are installed) is given the network, must reproduce its output, and is timed in turn with the others, twice
    where others are close to the fastest. Outputs may differ by 1e-4 of the largest number in float32, by 0.05 in
    bfloat16 and 0.25 in int8.

    Args:
        model: a network whose output consists of tensors, a transformers model's among them; it is left as it is. A
            decoder keeps no cache: `generate` is not what this is for.
        example_inputs: what the form will be given: a tensor, several in order, or several by name, as a tokenizer
            returns them; same shapes, same device, numbers in float32, token ids and masks in their own dtype.
        dtype: `torch.bfloat16` has the form compute in bfloat16, save on a CPU without instructions for it, where
            that gains no time; `torch.int8` in int8 (OpenVINO with nncf), for which the example is what
            activations' ranges are taken from: give it inputs as they will come, and evaluate the form. Otherwise it
            computes in float32.
        engine: `"auto"`, or the engine to take: `"eager"`, `"inductor"`, `"openvino"`, `"onnxruntime"`.

    Returns:
        The form, for inference; it is called as the model is called with the example. `candidates` tells what was
        tried.

    Raises:
        UserError: if the example, the output or the dtype cannot be used, or the named engine cannot work here, with
            the reason.
        RuntimeError: if the named engine computes something else.
    """
    examples, names = _checked_examples(example_inputs)
    dtype = torch.float32 if dtype is None else dtype
    if dtype not in TOLERANCES:
        raise UserError(f"dtype must be one of {', '.join(map(str, TOLERANCES))}, got {dtype}")
    if examples[0].device.type == "cpu" and dtype in products.WITHOUT_INSTRUCTIONS:
        dtype = torch.float32
    known = ("auto", *ENGINES)
    if engine not in known:
        raise UserError(f"engine must be one of {', '.join(known)}, got {engine!r}.{nearest(engine, known)}")
    _check_model(model, examples[0].device)
    with _plain(examples[0].device), _prepared(model, names) as network:
        examples = tuple(map(_own, examples))
        output, expected = _Output.of(network(*_copied(examples)))
        runners: dict[str, Runner] = {}
        tried: dict[str, Candidate] = {}
        for name in ENGINES if engine == "auto" else (engine,):
            try:
                run = ENGINES[name](network, _copied(examples), dtype)
                difference = _difference(run(*_copied(examples)), expected)
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
    if not runners:
        raise RuntimeError("; ".join(f"{name}: {candidate.reason}" for name, candidate in tried.items()))
    with _plain(examples[0].device):
        fastest, times = _fastest(runners, _copied(examples))
    candidates = tuple(
        Candidate(
            engine=name,
            milliseconds=times[name].milliseconds if name in times else None,
            difference=candidate.difference,
            reason=candidate.reason,
        )
        for name, candidate in tried.items()
    )
    return OptimizedModel(runners[fastest], fastest, dtype, examples, names, output, candidates)


class _ByPosition(nn.Module):
    """A network that is given by position what it takes by name: engines know no names."""

    def __init__(self, network: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.network, self.names = network, names

    def forward(self, *inputs: Tensor) -> Any:
        return self.network(**dict(zip(self.names, inputs, strict=True)))


@contextmanager
def _prepared(model: nn.Module, names: tuple[str, ...]) -> Iterator[nn.Module]:
    """The model in eval mode, without a decoding cache, its inputs by position; it is as it was afterwards."""
    modes = {module: module.training for module in model.modules()}
    config: Any = getattr(model, "config", None)
    caches = getattr(config, "use_cache", False) is True
    model.eval()
    if caches:
        config.use_cache = False
    try:
        yield _ByPosition(model, names).eval() if names else model
    finally:
        for module, training in modes.items():
            module.training = training
        if caches:
            config.use_cache = True


@contextmanager
def _plain(device: torch.device) -> Iterator[None]:
    """Whatever the caller has on, nothing is recorded for gradients, and numbers are of the form's own dtype."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def _own(x: Tensor) -> Tensor:
    """As all inputs are: a form would be compiled anew for those that know of gradients or of inference mode."""
    return (x.clone() if x.is_inference() else x.detach()).contiguous()


def _copied(examples: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """For a call: a network may write over what it is given."""
    return tuple(x.clone() for x in examples)


def _check_model(model: nn.Module, device: torch.device) -> None:
    """Refuse parameters that do not go with a float32 example on a device."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            has = f"{name} is {dtype_name(parameter.dtype)}"
            raise UserError(
                f"the model must be float32, {has}; give model.float(), and name dtype= for what to compute in"
            )
        if parameter.device != device:
            raise UserError(f"the model's {name} lies on {str(parameter.device)!r}, the example on {str(device)!r}")


@dataclass(frozen=True)
class _Output:
    """How the tensors of a network's output stand in it, and their dtypes."""

    structure: TreeSpec
    dtypes: tuple[torch.dtype, ...]

    @classmethod
    def of(cls, output: Any) -> tuple["_Output", list[Tensor]]:
        """The structure, and the tensors."""
        leaves, structure = tree_flatten(output)
        if others := {type(leaf).__name__ for leaf in leaves if not isinstance(leaf, Tensor)}:
            raise UserError(f"the network's output must consist of tensors, it holds {', '.join(sorted(others))}")
        if not all(leaf.isfinite().all() for leaf in leaves):
            raise UserError("the network's output for the example is not finite: no form can be checked against it")
        return cls(structure, tuple(leaf.dtype for leaf in leaves)), leaves

    def made_of(self, leaves: list[Tensor]) -> Any:
        typed = [leaf.to(dtype) for leaf, dtype in zip(leaves, self.dtypes, strict=True)]
        return tree_unflatten(typed, self.structure)


def _fastest(runners: dict[str, Runner], examples: tuple[Tensor, ...]) -> tuple[str, dict[str, Timing]]:
    """The fastest one's name, and what each took; those close to it are timed a second time."""

    def timed(runners: dict[str, Runner]) -> tuple[str, dict[str, Timing]]:
        calls = {name: lambda run=run: run(*examples) for name, run in runners.items()}
        times = time_in_turn(calls, rounds=_ROUNDS)
        return min(times, key=lambda name: times[name].ratio), times

    fastest, times = timed(runners)
    close = {name: run for name, run in runners.items() if times[name].ratio <= _CLOSE * times[fastest].ratio}
    if len(close) == 1:
        return fastest, times
    fastest, again = timed(close)
    return fastest, times | again


def _checked_examples(given: Examples) -> tuple[tuple[Tensor, ...], tuple[str, ...]]:
    """The inputs in order, and their names where they have names."""
    names: tuple[str, ...] = ()
    if isinstance(given, Mapping):
        names, given = tuple(given), tuple(given.values())
    examples = (given,) if isinstance(given, Tensor) else given
    if not isinstance(examples, tuple | list) or not all(isinstance(x, Tensor) for x in examples):
        kinds = ", ".join(type(x).__name__ for x in examples) if isinstance(examples, tuple | list) else ""
        raise UserError(f"example_inputs must be tensors, got {kinds or type(given).__name__}")
    if not all(x.numel() for x in examples) or not examples:
        raise UserError("example_inputs is empty: a form is checked and timed with what it will be given")
    if others := {dtype_name(x.dtype) for x in examples if x.is_floating_point()} - {"float32"}:
        raise UserError(
            f"the example must be float32, got {', '.join(sorted(others))}; name dtype= for what to compute in"
        )
    if len(devices := {str(x.device) for x in examples}) > 1:
        raise UserError(f"the example must lie on one device, it lies on {', '.join(sorted(devices))}")
    if examples[0].device.type == "meta":
        raise UserError("the example lies on 'meta', where nothing is computed")
    return tuple(examples), names


def _difference(got: list[Tensor], expected: list[Tensor]) -> float:
    """The largest deviation of a tensor over its largest number."""
    if [x.shape for x in got] != [x.shape for x in expected]:
        return float("inf")
    # Not Python's max, which passes over a NaN behind a number.
    return torch.stack([_relative(x.float(), y.float()) for x, y in zip(got, expected, strict=True)]).max().item()


def _relative(got: Tensor, expected: Tensor) -> Tensor:
    if not expected.numel():
        return expected.new_zeros(())
    largest = expected.abs().max()
    return (got - expected).abs().max() / torch.where(largest > 0, largest, 1)


def _kind(x: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return x.shape, x.dtype, x.device


def _described(kind: tuple[torch.Size, torch.dtype, torch.device]) -> str:
    shape, dtype, device = kind
    return f"{dtype_name(dtype)} {' × '.join(map(str, shape))} on {device}"
