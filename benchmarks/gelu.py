"""Fit the polynomial of `allmlp.ops.gelu`, and time it through the compiler beside the error function.

    python benchmarks/gelu.py

Two minutes on two cores. `--task fit` prints the coefficients; their last digits depend on the linear algebra library.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from allmlp import ops
from allmlp.allocator import keep_freed_memory
from allmlp.timing import time_in_turn

DEGREE = 8
FITTED = 6.0  # on |x| up to this


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=("fit", "time"), default=("fit", "time"))
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    if "fit" in options.task:
        coefficients, error = fit()
        print(f"coefficients {coefficients.tolist()}", f"largest error of x Φ(−x): {error:.1e}", sep="\n")
    if "time" in options.task:
        compare(options.rounds)


def fit(rounds: int = 300) -> tuple[Tensor, float]:
    """The coefficients of `p`, lowest power first, and the largest error of `t Φ(−t)` where `Φ(−t) = 1 / (2 p(t)¹⁶)`.

    Least squares, to first order in the error of `p`, with weights that grow where the error is large (Lawson's
    algorithm): this tends to the polynomial whose largest error is smallest.
    """
    t = FITTED / 2 * (1 - torch.cos(torch.pi * (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000))
    tail = torch.special.ndtr(-t)
    wanted = (2 * tail) ** (-1 / 16) - 1
    exponents = torch.arange(1, DEGREE + 1)
    powers = (t / FITTED).unsqueeze(1) ** exponents
    effect = 8 * t * (1 + wanted) ** -17
    weights, least = torch.ones_like(t), float("inf")
    for _ in range(rounds):
        weighing = effect * weights.sqrt()
        weighed, right = powers * weighing.unsqueeze(1), (wanted * weighing).unsqueeze(1)
        found = torch.linalg.lstsq(weighed, right, driver="gelsd").solution.squeeze(1)
        error = (t * (tail - 0.5 * (1 + powers @ found) ** -16)).abs()
        if error.max() < least:
            least = error.max().item()
            best = found / FITTED**exponents
        weights = weights * (error / error.max() + 1e-3)
        weights = weights / weights.max()
    return torch.cat((torch.ones(1), best)), least


def compare(rounds: int) -> None:
    """Print each form's time for a bias and the GELU of a hidden layer of gMLP-S, and its largest error."""
    keep_freed_memory()  # as building a model does
    x, bias, grad = 2 * torch.randn(8 * 196, 1536), torch.randn(1536), torch.randn(8 * 196, 1536)

    def compiled(gelu: Callable[[Tensor], Tensor], **options: str) -> Callable[[Tensor], Tensor]:
        return torch.compile(lambda x: gelu(x + bias), dynamic=False, options=options)

    forms = {
        "polynomial": compiled(ops.gelu),
        "polynomial, fused multiply-add": compiled(ops.gelu, **{"cpp.enable_floating_point_contract_flag": "fast"}),
        "error function": compiled(F.gelu),
        "eager": lambda x: F.gelu(x.add(bias)),
    }
    exact_x = (x + bias).double().requires_grad_()
    exact = F.gelu(exact_x)
    (exact_grad,) = torch.autograd.grad(exact, exact_x, grad.double())

    def inference(form: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.no_grad():
            return form(x)

    def training(form: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.autograd.grad(form(x.requires_grad_()), x, grad)[0]

    for task, run, right in (("forward", inference, exact), ("and backward", training, exact_grad)):
        times = time_in_turn({name: partial(run, form) for name, form in forms.items()}, rounds=rounds)
        for name, form in forms.items():
            error, time = (run(form) - right).abs().max().item(), times[name]
            print(f"{task:13}{name:31}{time.milliseconds:6.2f} ms, {time.ratio:.2f} of the first, error {error:.1e}")


if __name__ == "__main__":
    main()
