"""Every fused operator on a GPU, beside its torch form as it is and through torch's compiler.

    python benchmarks/fused.py                measures, writes results/fused.json and the part of docs/speed.md
    python benchmarks/fused.py --page         writes the part of docs/speed.md from the results there are
    python benchmarks/fused.py --interpret    tries everything out at tiny sizes on a CPU; writes nothing

Forward, and forward and backward, at the sizes of published networks. The outputs are compared, then all forms are
timed in turn. The fraction is that of the rate at which torch multiplies two large square matrices of the same dtype;
the products of a causal unit count once, without the upper triangle. The last lines say which operators beat the
compiler, by the geometric mean over their rows: these go into `MEASURED_FASTER` in src/allmlp/ops/backends.py; the
others are removed, and docs/speed.md says so.
"""

import argparse
import json
import math
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results" / "fused.json"
PAGE = Path(__file__).parents[1] / "docs" / "speed.md"
FUSED, EAGER, COMPILED = "fused", "torch", "torch.compile"
FORWARD, BACKWARD = "forward", "forward and backward"
# Largest difference of the two forms' outputs over the largest output.
DTYPES = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-2}


@dataclass(frozen=True, kw_only=True)
class Case:
    """An operator at one size.

    Attributes:
        operator: its name, as in `MEASURED_FASTER`.
        size: where the size is from, in words.
        shapes: of the tensors it is given.
        run: the operator of these tensors and `backend`.
        macs: multiply-adds of its products in forward; backward has twice as many.
    """

    operator: str
    size: str
    shapes: tuple[tuple[int, ...], ...]
    run: Callable[..., Tensor]
    macs: int = 0


def cases(tiny: bool) -> list[Case]:
    """Everything that is measured; with `tiny`, as small as it can be."""
    return [
        _gating("gMLP-S, 196 tokens", 128, 196, 768, tiny=tiny),
        _gating("gMLP-B, 196 tokens", 128, 196, 1536, tiny=tiny),
        _gating("causal gMLP, 512 tokens", 64, 512, 1536, causal=True, tiny=tiny),
        _gating("causal gMLP, 1,024 tokens", 32, 1024, 1536, causal=True, tiny=tiny),
        _gating("causal gMLP, 4,096 tokens", 8, 4096, 1536, causal=True, tiny=tiny),
        *_split_attention("ViP-S/7 and S²-MLPv2-S/7, 32 × 32", 128, 32, 192, tiny=tiny),
        *_split_attention("ViP-S/7 and S²-MLPv2-S/7, 16 × 16", 128, 16, 384, tiny=tiny),
        *_axial_shift("AS-MLP-T, 56 × 56", 128, 56, 96, tiny=tiny),
        *_axial_shift("AS-MLP-T, 14 × 14", 128, 14, 384, tiny=tiny),
        _spatial_shift("S²-MLP-wide, 14 × 14", 128, 14, 768, tiny=tiny),
        *_permute("ViP-S/7, 32 × 32", 128, 32, 192, 32, tiny=tiny),
        *_permute("ViP-S/7, 16 × 16", 128, 16, 384, 16, tiny=tiny),
    ]


def _gating(size: str, batch: int, tokens: int, channels: int, *, causal: bool = False, tiny: bool) -> Case:
    """The unit on the two halves of one tensor."""
    from allmlp.ops import normalized_spatial_gating

    if tiny:
        batch, tokens, channels = 2, 20, 16

    def run(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, **backend: Any) -> Tensor:
        u, v = x.chunk(2, dim=-1)
        return normalized_spatial_gating(u, v, norm_weight, norm_bias, 1e-5, weight, bias, causal=causal, **backend)

    pairs = tokens * (tokens + 1) // 2 if causal else tokens**2
    return Case(
        operator="normalized_spatial_gating",
        size=size,
        shapes=((batch, tokens, 2 * channels), (channels,), (channels,), (1, tokens, tokens), (1, tokens)),
        run=run,
        macs=batch * channels * pairs,
    )


def _split_attention(size: str, batch: int, side: int, channels: int, *, tiny: bool) -> list[Case]:
    """The pooling and the weighted sum of two maps and the last third of a tensor, as S²-MLPv2's branches lie."""
    from allmlp.ops import pool_branches, split_attention

    if tiny:
        batch, side, channels = 2, 5, 16
    maps = (batch, side, side, channels)

    def pool(x1: Tensor, x2: Tensor, expanded: Tensor, **backend: Any) -> Tensor:
        return pool_branches((x1, x2, expanded.chunk(3, dim=-1)[2]), **backend)

    def weigh(x1: Tensor, x2: Tensor, expanded: Tensor, logits: Tensor, **backend: Any) -> Tensor:
        return split_attention((x1, x2, expanded.chunk(3, dim=-1)[2]), logits, **backend)

    branches = (maps, maps, (*maps[:3], 3 * channels))
    logits = (batch, 3, channels)
    return [
        Case(operator="pool_branches", size=size, shapes=branches, run=pool),
        Case(operator="split_attention", size=size, shapes=(*branches, logits), run=weigh),
    ]


def _axial_shift(size: str, batch: int, side: int, channels: int, *, tiny: bool) -> list[Case]:
    """AS-MLP's two projections behind a shift by up to two positions."""
    from allmlp.ops import axial_shift_linear

    def along(axis: str) -> Case:
        run = partial(axial_shift_linear, shift_size=5, axis=axis)
        return _shifted("axial_shift_linear", f"{size}, along the {axis}", batch, side, channels, run, tiny=tiny)

    return [along("height"), along("width")]


def _spatial_shift(size: str, batch: int, side: int, channels: int, *, tiny: bool) -> Case:
    from allmlp.ops import spatial_shift_linear

    return _shifted("spatial_shift_linear", size, batch, side, channels, spatial_shift_linear, tiny=tiny)


def _shifted(
    operator: str, size: str, batch: int, side: int, channels: int, run: Callable[..., Tensor], *, tiny: bool
) -> Case:
    if tiny:
        batch, side, channels = 2, 5, 20
    shapes = ((batch, side, side, channels), (channels, channels), (channels,))
    return Case(operator=operator, size=size, shapes=shapes, run=run, macs=batch * side**2 * channels**2)


def _permute(size: str, batch: int, side: int, channels: int, segments: int, *, tiny: bool) -> list[Case]:
    """Permute-MLP's maps, which have no bias."""
    from allmlp.ops import permute_linear

    if tiny:
        batch, side, channels, segments = 2, 5, 20, 4
    numbers = side * channels // segments

    def along(axis: str) -> Callable[..., Tensor]:
        return lambda x, weight, **backend: permute_linear(x, weight, None, segments, axis, **backend)

    return [
        Case(
            operator="permute_linear",
            size=f"{size}, along the {axis}",
            shapes=((batch, side, side, channels), (numbers, numbers)),
            run=along(axis),
            macs=batch * side * segments * numbers**2,
        )
        for axis in ("height", "width")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="write the page from the results")
    parser.add_argument("--interpret", action="store_true", help="tiny sizes through Triton's interpreter, on a CPU")
    parser.add_argument("--operators", nargs="+", help="these alone; nothing is written then")
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    if options.page:
        write_page(json.loads(RESULTS.read_text(encoding="utf-8")))
        return
    # torch's profiler, which sees the memory of a CPU, reports its own start and stop otherwise.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    if options.interpret:
        # Triton reads this when it is imported, which the first import of the package does.
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        sys.exit("there is no CUDA device to measure on; --interpret tries the script out on a CPU")
    from allmlp.benchmark.measurement import machine
    from allmlp.files import write_json

    device = torch.device("cpu" if options.interpret else "cuda")
    rounds = 1 if options.interpret else options.rounds
    chosen = [case for case in cases(options.interpret) if case.operator in (options.operators or [case.operator])]
    if not chosen:
        parser.error(f"--operators: there are {', '.join(sorted({case.operator for case in cases(True)}))}")
    rates = {
        name: product_rate(device, getattr(torch, name), 64 if options.interpret else 8192) for name in options.dtype
    }
    rows = []
    for case in chosen:
        for dtype in options.dtype:
            for row in measure(case, dtype, device, rounds, rates[dtype]):
                rows.append(row)
                print(_line(row), flush=True)
    if options.interpret:
        print("everything runs; the times are those of the interpreter")
        return
    for operator, ratio in verdicts(rows).items():
        print(f"{operator}: the compiler takes {ratio:.2f} times as long{'' if ratio > 1 else ': to be removed'}")
    if options.operators:
        return
    results = {"machine": machine(), "macs_per_second": rates, "rows": rows}
    write_json(RESULTS, results)
    write_page(results)


def measure(case: Case, dtype: str, device: torch.device, rounds: int, rate: float) -> list[dict[str, Any]]:
    """Forward, and forward and backward, of all forms in turn."""
    from allmlp.benchmark.memory import peak_memory
    from allmlp.timing import time_in_turn

    torch.manual_seed(0)
    tensors = [torch.randn(shape, device=device, dtype=getattr(torch, dtype)) for shape in case.shapes]
    torch._dynamo.reset()
    plain = partial(case.run, backend="torch")
    forms = {
        FUSED: partial(case.run, backend="triton"),
        EAGER: plain,
        # The interpreter's machine is not what compiled code is measured on.
        COMPILED: torch.compile(plain, dynamic=False, backend="inductor" if device.type == "cuda" else "eager"),
    }
    with torch.no_grad():
        got, expected = forms[FUSED](*tensors).float(), forms[EAGER](*tensors).float()
    difference = ((got - expected).abs().max() / expected.abs().max()).item()
    if not difference < DTYPES[dtype]:
        raise RuntimeError(f"{case.operator}, {case.size}, {dtype}: the forms differ by {difference:.1e}")
    upstream = torch.randn_like(expected, dtype=tensors[0].dtype)
    leaves = [x.requires_grad_() for x in tensors]

    def forward(form: Callable[..., Tensor]) -> None:
        with torch.no_grad():
            form(*leaves)

    def backward(form: Callable[..., Tensor]) -> None:
        torch.autograd.grad(form(*leaves), leaves, upstream)

    rows = []
    for name, step, products in ((FORWARD, forward, 1), (BACKWARD, backward, 3)):
        steps = {form: partial(step, function) for form, function in forms.items()}
        times = time_in_turn(steps, rounds=rounds, warmup=1 if rounds == 1 else 5)
        fastest = products * case.macs / rate
        rows.append(
            {
                "operator": case.operator,
                "size": case.size,
                "dtype": dtype,
                "pass": name,
                "milliseconds": {form: time.milliseconds for form, time in times.items()},
                "ratio": {form: time.ratio for form, time in times.items()},
                "peak_bytes": {form: peak_memory(run, device) for form, run in steps.items()},
                "fraction": 1e3 * fastest / times[FUSED].milliseconds if case.macs else None,
                "difference": difference,
            }
        )
    return rows


def product_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Multiply-adds a second of a large product."""
    from allmlp.timing import time_in_turn

    left, right = torch.randn(2, size, size, device=device, dtype=dtype)
    time = time_in_turn({"product": lambda: left @ right}, rounds=20, warmup=5)["product"]
    return size**3 / (1e-3 * time.milliseconds)


def verdicts(rows: list[dict[str, Any]]) -> dict[str, float]:
    """How many times as long as each operator its torch form takes through the compiler, over all its rows."""
    ratios: dict[str, list[float]] = {}
    for row in rows:
        ratios.setdefault(row["operator"], []).append(row["ratio"][COMPILED])
    return {operator: math.exp(statistics.fmean(map(math.log, found))) for operator, found in ratios.items()}


def _line(row: dict[str, Any]) -> str:
    first, *others = row["milliseconds"].items()
    beside = ", ".join(f"{form} {row['ratio'][form]:.2f}" for form, _ in others)
    return f"{row['operator']}, {row['size']}, {row['dtype']}, {row['pass']}: {first[1]:.3f} ms; {beside}"


def write_page(results: dict[str, Any]) -> None:
    """Put the table into the documentation."""
    from allmlp.benchmark.report import replace_part

    names = ("operator", "size", "dtype", "pass", "fused ms", "torch / fused", "torch.compile / fused")
    lines = ["| " + " | ".join((*names, "of the product rate", "memory / torch.compile's")) + " |"]
    lines.append("|---" * (len(names) + 2) + "|")
    for row in results["rows"]:
        memory = row["peak_bytes"]
        cells = [row["operator"], row["size"], row["dtype"], row["pass"], f"{row['milliseconds'][FUSED]:.3f}"]
        cells += [f"{row['ratio'][form]:.2f}" for form in (EAGER, COMPILED)]
        cells.append("–" if row["fraction"] is None else f"{row['fraction']:.0%}")
        cells.append(f"{memory[FUSED] / memory[COMPILED]:.2f}" if memory[COMPILED] else "–")
        lines.append("| " + " | ".join(cells) + " |")
    facts = results["machine"]
    rates = ", ".join(f"{rate / 1e12:.0f} ({dtype})" for dtype, rate in results["macs_per_second"].items())
    described = (
        f"{facts.get('gpu', facts['processor'])}, torch {facts['versions']['torch']}, {facts['date']}; "
        f"tera multiply-adds a second of a large product: {rates}."
    )
    replace_part(PAGE, "fused", "\n".join(lines) + f"\n\n{described}")


if __name__ == "__main__":
    main()
