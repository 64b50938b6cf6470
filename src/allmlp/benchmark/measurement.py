"""What is measured: one network in one setting, allmlp's form beside the peers' and the floor."""

import gc
import itertools
import platform
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from allmlp.benchmark.floor import record_products, replay
from allmlp.benchmark.memory import activation_bytes, peak_memory
from allmlp.benchmark.networks import check_name, example, in_dtype, make
from allmlp.benchmark.peers import PeerMissingError, build_pair, peers_of
from allmlp.errors import UserError
from allmlp.machine import cores, processor
from allmlp.timing import Timing, time_in_turn

Task = Literal["inference", "training"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FLOOR = "matrix products alone"
OURS = "allmlp"
# A name for each vision family's network that its peers exist of, or that stands for it.
MODELS = (
    "gmlp_small_patch16_224",
    "mixer_base_patch16_224",
    "resmlp_12_patch16_224",
    "vip_small_patch7_224",
    "asmlp_tiny_patch4_224",
    "s2mlpv2_small_patch7_224",
    "s2mlp_deep_patch16_224",
)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is run.

    Attributes:
        model: allmlp's name of the network.
        task: `"inference"`, or `"training"`: forward, backward and an AdamW step.
        dtype: `"float32"` or `"bfloat16"`; training in bfloat16 is autocast over float32 parameters.
        compiled: through `torch.compile`.
        batch_size: images, or texts of the full context, of one call.
        device: `"cpu"` or `"cuda"`.
    """

    model: str
    task: Task = "inference"
    dtype: str = "float32"
    compiled: bool = False
    batch_size: int = 8
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class Result:
    """How one contender did in one setting.

    Attributes:
        setting: what was run.
        contender: `"allmlp"`, a peer's name, or the floor of allmlp's network.
        milliseconds: median time of a call.
        ratio: its time over allmlp's, the median over rounds.
        difference: largest difference of its float64 output from allmlp's over the largest output; None for the floor.
        peak_bytes: memory allocated at the highest point of a call above that in front of it; None for the floor.
        kept_bytes: memory kept for backward; in training only.
        engine: what ran it, where it is not torch as it is.
    """

    setting: Setting
    contender: str
    milliseconds: float
    ratio: float
    difference: float | None = None
    peak_bytes: int | None = None
    kept_bytes: int | None = None
    engine: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The fields, the setting's among them, as JSON takes them."""
        flat = asdict(self)
        return {**flat.pop("setting"), **flat}

    @classmethod
    def from_dict(cls, flat: Mapping[str, Any]) -> "Result":
        """The reverse of `as_dict`."""
        names = {field.name for field in fields(Setting)}
        setting = Setting(**{key: value for key, value in flat.items() if key in names})
        return cls(setting=setting, **{key: value for key, value in flat.items() if key not in names})


def settings(
    models: Iterable[str],
    *,
    tasks: Iterable[Task] = ("inference", "training"),
    dtypes: Iterable[str] = ("float32", "bfloat16"),
    compiled: Iterable[bool] = (False,),
    batch_sizes: Iterable[int] = (8,),
    device: str = "cpu",
) -> list[Setting]:
    """All combinations."""
    combinations = itertools.product(models, tasks, dtypes, compiled, batch_sizes)
    return [
        Setting(model=model, task=task, dtype=dtype, compiled=form, batch_size=batch_size, device=device)
        for model, task, dtype, form, batch_size in combinations
    ]


def measure(
    setting: Setting,
    *,
    peer_paths: Mapping[str, Path] | None = None,
    rounds: int = 5,
    seconds: float = 0.0,
    skipped: Callable[[str], None] = lambda reason: None,
) -> list[Result]:
    """Measure allmlp's form of a network, the floor, and each peer that is on this machine, in turn in this process.

    Before a peer is timed, it must give in float64 the output of allmlp's form with the same weights. For a compiled
    setting, what torch compiled before in this process is forgotten.

    Args:
        setting: what to run.
        peer_paths: checkouts of peers that cannot be installed, by name.
        rounds: timed calls of each, at least.
        seconds: time to spend on further rounds.
        skipped: told why a peer is left out.

    Raises:
        UserError: if the model is unknown, or the device is not there.
        RuntimeError: if a peer computes something else.
    """
    check(setting)
    # An optimizer refers to itself: that of the last measurement, and its network, may still be there.
    gc.collect()
    if setting.compiled:
        # A function that was compiled for as many networks as torch allows runs uncompiled from then on.
        torch.compiler.reset()
    device = torch.device(setting.device)
    contenders: dict[str, Callable[[], object]] = {}
    facts: dict[str, dict[str, Any]] = {}
    for name, ours, theirs in _networks(setting.model, peer_paths or {}, skipped):
        difference = None if theirs is None else compare(ours, theirs, example(setting.model, 2))
        if OURS not in contenders:
            step, facts[OURS] = _prepare(ours, setting, device)
            contenders[OURS] = step
            contenders[FLOOR] = replay(_products(ours, setting, device))
            facts[FLOOR] = {}
        if theirs is not None:
            contenders[name], facts[name] = _prepare(theirs, setting, device)
            facts[name]["difference"] = difference
    times = time_in_turn(contenders, rounds=rounds, seconds=seconds)
    return [_result(setting, name, times[name], facts[name]) for name in contenders]


def compare(ours: nn.Module, theirs: nn.Module, x: Tensor) -> float:
    """The largest difference of the two outputs for `x` in float64 over the largest output.

    Raises:
        RuntimeError: if it is more than rounding.
    """
    dtypes = [next(model.parameters()).dtype for model in (ours, theirs)]
    with torch.no_grad():
        expected, got = (model.double()(in_dtype(x, torch.float64)) for model in (theirs, ours))
    for model, dtype in zip((ours, theirs), dtypes, strict=True):
        model.to(dtype)
    difference = ((got - expected).abs().max() / expected.abs().max()).item()
    if not difference < 1e-10:
        raise RuntimeError(f"the networks differ: by {difference:.1e} of the largest output, in float64")
    return difference


def machine() -> dict[str, Any]:
    """What the figures depend on: processor, threads, device, versions, and the day."""
    facts: dict[str, Any] = {
        "date": date.today().isoformat(),
        "processor": processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "vector_extensions": torch.backends.cpu.get_cpu_capability(),
        "bfloat16_instructions": _bfloat16_instructions(),
        "python": platform.python_version(),
        "versions": {},
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    for package in ("torch", "timm", "g-mlp-pytorch", "mlp-mixer-pytorch", "onnxruntime", "openvino"):
        try:
            facts["versions"][package] = version(package)
        except PackageNotFoundError:
            continue
    return facts


def check(setting: Setting) -> None:
    """Refuse what cannot be measured here.

    Raises:
        UserError: if the model is unknown, the dtype is none of those measured, or the device is not there.
    """
    check_name(setting.model)
    if setting.dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {setting.dtype!r}")
    if setting.device == "cuda" and not torch.cuda.is_available():
        raise UserError("this machine has no CUDA device; leave --device out, or name cpu")


def _networks(
    model: str, peer_paths: Mapping[str, Path], skipped: Callable[[str], None]
) -> Iterable[tuple[str, nn.Module, nn.Module | None]]:
    """(peer's name, allmlp's network, the peer's), or allmlp's alone where there is no peer."""
    alone = True
    for peer in peers_of(model):
        try:
            ours, theirs = build_pair(peer, peer_paths)
        except PeerMissingError as reason:
            skipped(str(reason))
            continue
        alone = False
        yield peer.name, ours, theirs
    if alone:
        yield OURS, make(model), None


def _prepare(model: nn.Module, setting: Setting, device: torch.device) -> tuple[Callable[[], object], dict[str, Any]]:
    """A function that runs the network once, and its memory."""
    step, forward = _steps(model, setting, device)
    facts: dict[str, Any] = {}
    if setting.task == "training":
        facts["kept_bytes"] = activation_bytes(model, forward)
    step()
    facts["peak_bytes"] = peak_memory(step, device)
    return step, facts


def _steps(
    model: nn.Module, setting: Setting, device: torch.device
) -> tuple[Callable[[], object], Callable[[], object]]:
    """One call of what is timed, and of its forward pass."""
    dtype = DTYPES[setting.dtype]
    x = example(setting.model, setting.batch_size).to(device)
    if setting.task == "inference":
        model = model.to(device, dtype).eval()
        x = in_dtype(x, dtype)
        run: Callable[[Tensor], Tensor] = torch.compile(model) if setting.compiled else model

        def infer() -> Tensor:
            with torch.no_grad():
                return run(x)

        return infer, infer
    model = model.to(device).train()
    run = torch.compile(model) if setting.compiled else model
    # As the Trainer makes it.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def loss() -> Tensor:
        autocast = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()
        with autocast:
            output = run(x)
        return output.float().logsumexp(-1).mean()

    def train() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return train, loss


def _products(model: nn.Module, setting: Setting, device: torch.device) -> list[Any]:
    eager = Setting(**{**asdict(setting), "compiled": False})
    step, _ = _steps(model, eager, device)
    return record_products(step)


def _result(setting: Setting, contender: str, timing: Timing, facts: Mapping[str, Any]) -> Result:
    return Result(setting=setting, contender=contender, milliseconds=timing.milliseconds, ratio=timing.ratio, **facts)


def _bfloat16_instructions() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and any(flag in cpuinfo.read_text() for flag in ("avx512_bf16", "amx_bf16", "bf16mm"))
