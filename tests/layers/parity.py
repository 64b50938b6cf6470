"""A layer against a plain float64 form of it: output and every gradient."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from tests.tolerances import assert_close

Parameters = Mapping[str, Tensor]
Reference = Callable[..., Tensor]


def assert_matches(layer: nn.Module, reference: Reference, *inputs: Tensor) -> None:
    """Fail unless `layer` gives the output and the gradients of `reference(parameters, *inputs)`.

    Every parameter gets random values first, so that none hides behind an initial zero or one. The float64 layer must
    agree to float64's tolerance, the float32 one to float32's.
    """
    layer = layer.double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    expected, upstream, expected_grads = _run(
        lambda *x: reference(dict(layer.named_parameters()), *x), layer, [x.double() for x in inputs]
    )
    for dtype in (torch.float64, torch.float32):
        layer.to(dtype)
        out, _, grads = _run(layer, layer, [x.to(dtype) for x in inputs], upstream)
        assert out.dtype == dtype
        assert_close(out, expected)
        assert grads.keys() == expected_grads.keys()
        for name, grad in grads.items():
            # A gradient that sums over many positions is judged on its own scale.
            scale = expected_grads[name].abs().max().clamp_min(1)
            assert_close(grad / scale.to(dtype), expected_grads[name] / scale)


def _run(
    function: Callable[..., Tensor], layer: nn.Module, inputs: list[Tensor], upstream: Tensor | None = None
) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    wanted = {f"input {i}": x for i, x in enumerate(inputs)} | dict(layer.named_parameters())
    out = function(*inputs)
    if upstream is None:
        upstream = torch.randn_like(out)
    grads = torch.autograd.grad(out, list(wanted.values()), upstream.to(out.dtype))
    return out.detach(), upstream, dict(zip(wanted, grads, strict=True))


def gelu(x: Tensor) -> Tensor:
    """`x Φ(x)`, with the error function."""
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def normalise(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    """Zero mean and unit variance over `dims`."""
    centred = x - x.mean(dims, keepdim=True)
    return centred / (centred.square().mean(dims, keepdim=True) + eps).sqrt()


def linear(p: Parameters, name: str, x: Tensor) -> Tensor:
    """The linear map `name` of the last dimension, with its bias where it has one."""
    y = torch.einsum("...c,oc->...o", x, p[f"{name}.weight"])
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def layer_norm(p: Parameters, name: str, x: Tensor, eps: float) -> Tensor:
    """The layer norm `name` of the last dimension."""
    return normalise(x, (-1,), eps) * p[f"{name}.weight"] + p[f"{name}.bias"]


def sample_norm(p: Parameters, name: str, x: Tensor) -> Tensor:
    """The norm `name` of each sample over positions and channels together."""
    return normalise(x, (1, 2, 3), 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]


def channel_mlp(p: Parameters, name: str, x: Tensor) -> Tensor:
    """`fc2 GELU(fc1 x)`."""
    return linear(p, f"{name}.fc2", gelu(linear(p, f"{name}.fc1", x)))


def under(p: Parameters, name: str) -> Parameters:
    """The parameters below `name`, by their names there."""
    return {key.removeprefix(f"{name}."): value for key, value in p.items() if key.startswith(f"{name}.")}
