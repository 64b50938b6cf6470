"""Causal products without what lies above their diagonal: beside whole ones, and in a language model beside its peer.

    python benchmarks/causal.py

A few minutes on two cores, float32; writes results/causal.json and the tables of docs/speed.md (`--page`: measures
nothing, writes the page from the results). The language model is g-mlp-pytorch's, 4 layers of width 256 with one and
with four spatial heads, both sides with the same weights; the outputs are compared before anything is timed.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

LENGTHS = (256, 512, 1024, 2048, 4096)
MODELS = tuple((length, heads) for heads in (1, 4) for length in LENGTHS[:-1])
RESULTS = Path(__file__).parent / "results" / "causal.json"
PAGE = Path(__file__).parents[1] / "docs" / "speed.md"
NEVER = 2**62


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="measure nothing: write the page from the results")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    if not options.page:
        measure(options.rounds)
    write_page(json.loads(RESULTS.read_text(encoding="utf-8")))


def measure(rounds: int) -> None:
    """Write the results."""
    from allmlp.benchmark.measurement import machine
    from allmlp.files import write_json

    products, models = [], []
    for length in LENGTHS:
        products.append({"length": length, **times_of_products(length, rounds)})
        print(products[-1], flush=True)
    for length, heads in MODELS:
        models.append({"length": length, "heads": heads, **times_of_models(length, heads, rounds)})
        print(models[-1], flush=True)
    write_json(RESULTS, {"machine": machine(), "products": products, "models": models})


def times_of_products(length: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of the whole product, and the share of them that blocks take, forward and of both gradients."""
    import torch

    from allmlp.ops.token_linear import input_gradient, token_linear, weight_gradient
    from allmlp.timing import time_in_turn

    x, grad = torch.randn(2, 4, length, 512)
    weight, bias = torch.randn(length, length) / length, torch.ones(length)
    works: dict[str, Callable[[], Any]] = {
        "forward": lambda: token_linear(x, weight, bias, causal=True),
        "input's gradient": lambda: input_gradient(grad, weight, causal=True),
        "weight's gradient": lambda: weight_gradient(grad, x, causal=True),
    }
    found: dict[str, Any] = {}
    with torch.no_grad():
        for name, work in works.items():
            ways = {"whole": from_length(NEVER, work), "blocks": from_length(0, work)}
            times = time_in_turn(ways, rounds=2 * rounds)
            found[name] = {"whole_ms": times["whole"].milliseconds, "blocks": times["blocks"].ratio}
    return found


def times_of_models(length: int, heads: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of allmlp, and the times of whole products and of the peer over it, for a training step's passes."""
    import torch
    from g_mlp_pytorch import gMLP

    from allmlp.checkpoints.conversion import convert_state_dict
    from allmlp.timing import time_in_turn

    torch.manual_seed(0)
    theirs = gMLP(num_tokens=256, dim=256, depth=4, seq_len=length, heads=heads, causal=True).eval()
    ours = convert_state_dict(theirs.state_dict(), facts={"causal": True, "gate_act": "none"}).model.eval()
    ids = torch.randint(256, (2, length))

    def logits_of_ours() -> torch.Tensor:
        return ours(ids, use_cache=False).logits

    with torch.no_grad():
        torch.testing.assert_close(logits_of_ours(), theirs(ids), rtol=1e-4, atol=1e-4)

    def forward(logits: Callable[[], torch.Tensor]) -> None:
        with torch.no_grad():
            logits()

    def training(logits: Callable[[], torch.Tensor]) -> None:
        logits().logsumexp(-1).mean().backward()

    found: dict[str, Any] = {}
    for name, work in (("inference", forward), ("forward and backward", training)):
        times = time_in_turn(
            {
                "allmlp": lambda work=work: work(logits_of_ours),
                "whole": from_length(NEVER, lambda work=work: work(logits_of_ours)),
                "g-mlp-pytorch": lambda work=work: work(lambda: theirs(ids)),
            },
            rounds=rounds,
        )
        found[name] = {"ms": times["allmlp"].milliseconds}
        found[name] |= {other: times[other].ratio for other in ("whole", "g-mlp-pytorch")}
    return found


def from_length(long: int, work: Callable[[], Any]) -> Callable[[], Any]:
    """The work with causal products in blocks from so many tokens on."""
    module: Any = sys.modules["allmlp.ops.token_linear"]

    def run() -> Any:
        former, module._LONG = module._LONG, long
        try:
            return work()
        finally:
            module._LONG = former

    return run


def write_page(results: dict[str, Any]) -> None:
    """Put the tables into the documentation."""
    from allmlp.benchmark.report import replace_part

    lines = ["| blocks / whole product | " + " | ".join(f"{row['length']:,}" for row in results["products"]) + " |"]
    lines.append("|---" + "|---:" * len(results["products"]) + "|")
    for work in ("forward", "input's gradient", "weight's gradient"):
        lines.append(f"| {work} | " + " | ".join(f"{row[work]['blocks']:.2f}" for row in results["products"]) + " |")
    lines += ["", "| language model, tokens | heads | | ms | whole products / allmlp | g-mlp-pytorch / allmlp |"]
    lines.append("|---:|---:|---|---:|---:|---:|")
    for row in results["models"]:
        for work in ("inference", "forward and backward"):
            figures = row[work]
            ratios = f"{figures['whole']:.2f} | {figures['g-mlp-pytorch']:.2f}"
            lines.append(f"| {row['length']:,} | {row['heads']} | {work} | {figures['ms']:.0f} | {ratios} |")
    facts = results["machine"]
    described = f"{facts['processor']}, {facts['threads']} threads, torch {facts['versions']['torch']}."
    replace_part(PAGE, "causal", "\n".join(lines) + f"\n\n{described}")


if __name__ == "__main__":
    main()
