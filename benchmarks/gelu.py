"""Fit the rational function of `allmlp.ops.gelu`, and time it through the compiler beside the error function.

    python benchmarks/gelu.py

A minute on two cores. `--task fit` prints the coefficients; their last digits depend on the linear algebra library.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

from allmlp import ops
from allmlp.timing import time_in_turn

DEGREE = 5  # of both polynomials, in x²
FITTED = 5.6  # on |x| up to this


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=("fit", "time"), default=("fit", "time"))
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    if "fit" in options.task:
        numerator, denominator, error = fit()
        print(f"numerator {numerator.tolist()}", f"denominator {denominator.tolist()}", sep="\n")
        print(f"largest error of x(Φ − 1/2): {error:.1e}")
    if "time" in options.task:
        compare(options.rounds)


def fit(rounds: int = 200) -> tuple[Tensor, Tensor, float]:
    """Numerator, denominator (both lowest power first) and the largest error of `x (Φ(x) − 1/2)`.

    Least squares in the coefficients, the residual divided by the round before's denominator, with weights that grow
    where the error is large (Lawson's algorithm): this tends to the function whose largest error is smallest.
    """
    nodes = FITTED / 2 * (1 - torch.cos(torch.pi * (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000))
    wanted = (torch.special.ndtr(nodes) - 0.5) / nodes
    exponents = torch.arange(DEGREE + 1)
    scales = FITTED ** (2 * exponents.double())
    powers = (nodes / FITTED).square().unsqueeze(1) ** exponents
    weights, denominator, least = torch.ones_like(nodes), torch.ones_like(nodes), float("inf")
    for _ in range(rounds):
        weighing = (weights.sqrt() * nodes**2 / denominator).unsqueeze(1)
        columns = torch.cat((powers, -wanted.unsqueeze(1) * powers[:, 1:]), 1) * weighing
        found = torch.linalg.lstsq(columns, wanted.unsqueeze(1) * weighing, driver="gelsd").solution.squeeze(1)
        above, below = found[: DEGREE + 1], torch.cat((torch.ones(1), found[DEGREE + 1 :]))
        denominator = powers @ below
        error = (nodes**2 * (powers @ above / denominator - wanted)).abs()
        if error.max() < least:
            least = error.max().item()
            best = above / scales, below / scales
        weights = weights * (error / error.max() + 1e-3)
        weights = weights / weights.max()
    return *best, least


def compare(rounds: int) -> None:
    """Print each form's time for a bias and the GELU of a hidden layer of gMLP-S, and its largest error."""
    x, bias = 2 * torch.randn(8 * 196, 1536), torch.randn(1536)
    exact = F.gelu((x + bias).double())
    rational = torch.compile(lambda x: ops.gelu(x + bias), dynamic=False)
    by_erf = torch.compile(lambda x: F.gelu(x + bias), dynamic=False)
    forms = {"rational function": rational, "error function": by_erf, "eager": lambda x: F.gelu(x.add(bias))}
    with torch.no_grad():
        times = time_in_turn({name: lambda form=form: form(x) for name, form in forms.items()}, rounds=rounds)
        for name, form in forms.items():
            error = (form(x) - exact).abs().max().item()
            time = times[name]
            print(f"{name:18}{time.milliseconds:6.2f} ms, {time.ratio:.2f} of the first, error {error:.1e}")


if __name__ == "__main__":
    main()
