"""How the cost of mixing tokens grows with their number: Toeplitz gMLP, dense gMLP, causal attention.

    python benchmarks/toeplitz.py

takes two to eight minutes on two cores and writes results/toeplitz.json and .png and the table of docs/language.md.

One causal layer's work between its tokens, 512 channels, float32, forward: `toeplitz_product` by both of its ways, the
dense spatial product, and `scaled_dot_product_attention` with 8 heads of 64. What would take too much memory (a dense
weight of 65,536 tokens takes 16 GiB) is left out; its line goes on with the square of the length.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

LENGTHS = tuple(2**power for power in range(9, 17))
CHANNELS, HEADS = 512, 8
DENSE_LIMIT, DENSE_TOEPLITZ_LIMIT = 32_768, 16_384
RESULTS = Path(__file__).parent / "results" / "toeplitz.json"
PICTURE = RESULTS.with_suffix(".png")
PAGE = Path(__file__).parents[1] / "docs" / "language.md"
FFT, DENSE_TOEPLITZ, DENSE, ATTENTION = "Toeplitz, FFT", "Toeplitz, dense product", "dense gMLP", "causal attention"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="measure nothing: write the page from the results")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if not options.page:
        measure(options)
    write_page(json.loads(RESULTS.read_text(encoding="utf-8")))


def measure(options: argparse.Namespace) -> None:
    """Write the results and draw them."""
    import torch

    from allmlp.benchmark.measurement import machine
    from allmlp.files import write_json

    if options.threads:
        torch.set_num_threads(options.threads)
    rows = []
    for length in options.lengths:
        rows.append(times_of(length))
        print(rows[-1], flush=True)
    results = {"machine": machine(), "rows": rows}
    write_json(RESULTS, results)
    draw(results)


def times_of(length: int) -> dict[str, Any]:
    """Milliseconds of every way to mix this many tokens."""
    import torch
    import torch.nn.functional as F

    from allmlp.ops import toeplitz_product, token_linear
    from allmlp.timing import time_in_turn

    torch.manual_seed(0)
    v = torch.randn(1, length, CHANNELS)
    lags = torch.randn(1, 2 * length - 1) / length**0.5
    q, k, w = torch.randn(3, 1, HEADS, length, CHANNELS // HEADS)
    ways: dict[str, Callable[[], Any]] = {
        FFT: lambda: toeplitz_product(lags, v, causal=True, backend="fft"),
        ATTENTION: lambda: F.scaled_dot_product_attention(q, k, w, is_causal=True),
    }
    if length <= DENSE_LIMIT:
        weight = torch.randn(length, length)
        ways[DENSE] = lambda: token_linear(v, weight, torch.zeros(1), causal=True)
    if length <= DENSE_TOEPLITZ_LIMIT:
        ways[DENSE_TOEPLITZ] = lambda: toeplitz_product(lags, v, causal=True, backend="dense")
    rounds, warmup = (9, 2) if length <= 4096 else (3, 1)
    with torch.inference_mode():
        if length <= 4096:
            exact = toeplitz_product(lags.double(), v.double(), causal=True, backend="dense")
            error = (toeplitz_product(lags, v, causal=True, backend="fft") - exact).abs().max().item()
        else:
            error = None
        times = time_in_turn(ways, rounds=rounds, warmup=warmup)
    return {
        "length": length,
        "milliseconds": {name: timing.milliseconds for name, timing in times.items()},
        "largest_error_of_the_fft": error,
    }


def draw(results: dict[str, Any]) -> None:
    """All ways over the length, both axes logarithmic."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from allmlp.training.report import BLUE, GREEN, ORANGE, RED, STYLE, save

    rows = results["rows"]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.5, 4.2), layout="constrained")
        axes = figure.subplots()
        for name, colour in ((FFT, BLUE), (DENSE_TOEPLITZ, GREEN), (DENSE, ORANGE), (ATTENTION, RED)):
            points = [(row["length"], row["milliseconds"][name]) for row in rows if name in row["milliseconds"]]
            axes.plot(*zip(*points, strict=True), color=colour, marker="o", ms=3, label=name)
            length, time = points[-1]
            if length < rows[-1]["length"]:
                last = rows[-1]["length"]
                axes.plot([length, last], [time, time * (last / length) ** 2], color=colour, linestyle=":", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set(title="Mixing tokens, ms (one causal layer, 512 channels, forward)", xlabel="tokens")
        axes.set_xticks([row["length"] for row in rows], [f"{row['length']:,}" for row in rows], fontsize=7)
        axes.legend()
    save(figure, PICTURE)


def write_page(results: dict[str, Any]) -> None:
    """Put the table and the picture into the documentation."""
    from allmlp.benchmark.report import replace_part

    names = (FFT, DENSE_TOEPLITZ, DENSE, ATTENTION)
    lines = [f"| tokens | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for row in results["rows"]:
        cells = [f"{row['milliseconds'][name]:,.1f}" if name in row["milliseconds"] else "" for name in names]
        lines.append(f"| {row['length']:,} | {' | '.join(cells)} |")
    facts = results["machine"]
    described = f"Milliseconds on {facts['processor']}, {facts['threads']} threads, torch {facts['versions']['torch']}."
    picture = f"![Growth of cost](../benchmarks/results/{PICTURE.name})"
    replace_part(PAGE, "toeplitz", "\n".join(lines) + f"\n\n{described}\n\n{picture}")


if __name__ == "__main__":
    main()
