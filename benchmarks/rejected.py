"""Forms that were tried and left out beside the ones in use: the figures of "What did not work" in docs/speed.md.

    python benchmarks/rejected.py

Three minutes on two cores. A ratio above 1 means that the form left out takes longer.
"""

import argparse
import math
from collections.abc import Callable, Mapping

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor import config as inductor

from allmlp.layers import SampleNorm
from allmlp.layers.recomputing import activated
from allmlp.ops import linear_onto
from allmlp.ops.linear import linear_weight_gradient
from allmlp.ops.products import WITHOUT_INSTRUCTIONS
from allmlp.timing import time_in_turn

Forms = Mapping[str, Callable[[], object]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            for name, forms in _cases(dtype):
                times = time_in_turn(forms, rounds=options.rounds)
                (used, first), *others = times.items()
                beside = ", ".join(f"{other}: {time.ratio:.2f}" for other, time in others)
                print(f"{str(dtype)[6:]:9}{name:37}{used}: {first.milliseconds:.2f} ms; {beside}", flush=True)


def _cases(dtype: torch.dtype) -> list[tuple[str, Forms]]:
    return [
        ("token product of gMLP-S", _token_product(dtype)),
        ("channel MLP 1568 × 384 → 1536", _row_tiles(dtype, 1568, 384, 1536)),
        ("linear and GELU 1568 × 256 → 1536", _epilogue(dtype, 1568, 256, 1536)),
        ("linear and GELU 2048 × 384 → 1152", _epilogue(dtype, 2048, 384, 1152)),
        ("residual behind 2048 × 1152 → 384", _residual(dtype, 2048, 1152, 384)),
        ("weight's gradient 1568 × 1536 → 384", _weight_gradient(dtype, 1568, 1536, 384)),
        ("weight's gradient 1568 × 3072 → 768", _weight_gradient(dtype, 1568, 3072, 768)),
        ("weight's gradient 1568 × 384 → 1536", _weight_gradient(dtype, 1568, 384, 1536)),
        ("branches of Permute-MLP, 16 × 16", _permuted_branches(dtype)),
        ("GELU of 1568 × 1536", _gelu(dtype)),
        ("GELU and gradient of 1568 × 1536", _gelu_and_gradient(dtype)),
        ("network gMLP-S, batch 8", _slices(dtype)),
        ("network gMLP-S, compiled", _compiled(dtype)),
        ("AS-MLP's norm and MLP, compiled", _folded_norm(dtype)),
    ]


def _token_product(dtype: torch.dtype) -> Forms:
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((8, 196, 768), (196, 196), (196,)))
    trained = nn.Parameter(weight)
    return {
        "batched": lambda: torch.baddbmm(bias[:, None], trained.expand(8, -1, -1), x),
        "matmul": lambda: torch.matmul(trained, x) + bias[:, None],
        "transposed": lambda: F.linear(x.transpose(1, 2), trained, bias).transpose(1, 2).contiguous(),
    }


def _row_tiles(dtype: torch.dtype, rows: int, width: int, hidden: int) -> Forms:
    x = torch.randn(rows, width).to(dtype)
    mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)).to(dtype)
    tiled = {
        f"tiles of {size}": lambda size=size: torch.cat([mlp(part) for part in x.split(size)]) for size in (256, 512)
    }
    return {"whole": lambda: mlp(x), **tiled}


def _epilogue(dtype: torch.dtype, rows: int, width: int, hidden: int) -> Forms:
    x, linear = torch.randn(rows, width).to(dtype), nn.Linear(width, hidden).to(dtype)
    fused = torch.ops.mkldnn._linear_pointwise
    forms = {
        "two calls": lambda: F.gelu(linear(x)),
        "epilogue": lambda: fused(x, linear.weight, linear.bias, "gelu", [], "none"),
    }
    if dtype in WITHOUT_INSTRUCTIONS:
        del forms["epilogue"]
    # In bfloat16 the epilogue is the form in use.
    return forms if dtype == torch.float32 else dict(reversed(forms.items()))


def _residual(dtype: torch.dtype, rows: int, read: int, written: int) -> Forms:
    shapes = (rows, written), (rows, read), (written, read), (written,)
    onto, x, weight, bias = (torch.randn(shape).to(dtype) for shape in shapes)
    return {
        "in use": lambda: linear_onto(onto, x, weight, bias),
        "sum of its own": lambda: onto + F.linear(x, weight, bias),
        "product onto residual and bias": lambda: (onto + bias).addmm_(x, weight.t()),
    }


def _weight_gradient(dtype: torch.dtype, rows: int, read: int, written: int) -> Forms:
    x, grad = torch.randn(rows, read).to(dtype), torch.randn(rows, written).to(dtype)
    return {
        "in use": lambda: linear_weight_gradient(grad, x),
        "as it lies": lambda: grad.t() @ x,
        "gradient transposed": lambda: _transposed(grad) @ x,
        "input transposed": lambda: _transposed(_transposed(x) @ grad),
    }


def _transposed(x: Tensor) -> Tensor:
    return torch.cat([rows.t() for rows in x.split(256)], dim=1)


def _permuted_branches(dtype: torch.dtype) -> Forms:
    batch, side, segments, width = 8, 16, 16, 24
    h_BWNHS, w_BHNWS = (torch.randn(batch, side, segments, side, width).to(dtype) for _ in range(2))
    c_BHWC = torch.randn(batch, side, side, segments * width).to(dtype)
    weights = [torch.rand(batch, 1, 1, segments * width).to(dtype) for _ in range(3)]
    h, w = h_BWNHS.permute(0, 3, 1, 2, 4), w_BHNWS.permute(0, 1, 3, 2, 4)

    def copied() -> Tensor:
        out = h.flatten(3) * weights[0]
        return out.addcmul_(w.flatten(3), weights[1]).addcmul_(c_BHWC, weights[2])

    def in_place() -> Tensor:
        parts = [weight.unflatten(-1, (segments, width)) for weight in weights]
        out = c_BHWC.unflatten(-1, (segments, width)) * parts[2]
        return out.addcmul_(h, parts[0]).addcmul_(w, parts[1])

    return {"copied": copied, "read where they lie": in_place}


def _gelu(dtype: torch.dtype) -> Forms:
    x = torch.randn(1568, 1536).to(dtype)
    return {"error function": lambda: F.gelu(x), "tanh": lambda: F.gelu(x, approximate="tanh")}


def _gelu_and_gradient(dtype: torch.dtype) -> Forms:
    x, grad = torch.randn(2, 1568, 1536).to(dtype)

    def together(rows: int) -> tuple[Tensor, Tensor]:
        y, grad_x = torch.empty_like(x), torch.empty_like(x)
        for x_, grad_, y_, grad_x_ in zip(*(t.split(rows) for t in (x, grad, y, grad_x)), strict=True):
            distribution = (x_ * math.sqrt(0.5)).erf_().add_(1).mul_(0.5)
            torch.mul(x_, distribution, out=y_)
            density = torch.mul(x_, x_, out=grad_x_).mul_(-0.5).exp_()
            torch.add(distribution, density.mul_(x_), alpha=1 / math.sqrt(2 * math.pi), out=grad_x_).mul_(grad_)
        return y, grad_x

    pieces = {f"pieces of {rows}": lambda rows=rows: together(rows) for rows in (32, 128)}
    return {
        "two operators": lambda: (F.gelu(x), torch.ops.aten.gelu_backward(grad, x)),
        "one error function": lambda: together(len(x)),
        **pieces,
    }


def _slices(dtype: torch.dtype) -> Forms:
    model = timm.create_model("gmlp_small_patch16_224").eval().to(dtype)
    images = torch.randn(8, 3, 224, 224).to(dtype)
    sliced = {f"slices of {n}": lambda n=n: torch.cat([model(part) for part in images.split(n)]) for n in (4, 2, 1)}
    return {"whole": lambda: model(images), **sliced}


def _compiled(dtype: torch.dtype) -> Forms:
    images = torch.randn(8, 3, 224, 224).to(dtype)

    def network(**options: object) -> Callable[[], object]:
        model = timm.create_model("gmlp_small_patch16_224").eval().to(dtype)
        compiled = torch.compile(model, dynamic=False)
        # An option of `torch.compile` would come too late: weights are frozen while the model is read.
        with inductor.patch(**options):
            compiled(images)
        return lambda: compiled(images)

    templates = {"max_autotune": True, "max_autotune_gemm_backends": "CPP,ATEN"}
    return {
        "as it is": network(),
        "frozen weights": network(freezing=True),
        "and autotuned products": network(freezing=True, **templates),
    }


def _folded_norm(dtype: torch.dtype) -> Forms:
    """A sample's mean and deviation taken out of the product of what is not normalised yet."""
    x, norm, act = torch.randn(8, 56, 56, 96).to(dtype), SampleNorm(96).to(dtype), nn.GELU()
    fc1, fc2 = nn.Linear(96, 384).to(dtype), nn.Linear(384, 96).to(dtype)
    weight = fc1.weight * norm.weight
    totals, bias = weight.float().sum(1), fc1(norm.bias).float()

    def normalised(x: Tensor) -> Tensor:
        return fc2(activated(act, fc1(norm(x))))

    def folded(x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x.float(), (1, 2, 3), correction=0)
        scale = torch.rsqrt(variance + norm.eps)
        offsets = torch.addmm(bias, (mean * scale)[:, None], totals[None], alpha=-1)
        y = scale[:, None, None, None] * F.linear(x, weight) + offsets[:, None, None]
        return fc2(activated(act, y).to(dtype))

    compiled = {form: torch.compile(form, dynamic=False) for form in (normalised, folded)}
    for form in compiled.values():
        form(x)
    return {
        "normalised": lambda: compiled[normalised](x),
        "folded into the product": lambda: compiled[folded](x),
    }


if __name__ == "__main__":
    main()
