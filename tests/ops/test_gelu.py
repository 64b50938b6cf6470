"""The GELU by a polynomial, in compiled models, against the error function."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from allmlp.ops import gelu, gelu_reference
from allmlp.ops.gelu import _by_tail, _derivative
from tests.compilers import need_to_know_the_compiler

pytestmark = pytest.mark.usefixtures("unchecked")

FAR = torch.tensor([-1e30, -1e4, -30.0, -17.5, -13.0, -0.0, 0.0, 1e-30, 13.0, 17.5, 30.0, 1e4, 1e30])


@pytest.fixture(autouse=True)
def _compiles_anew() -> None:
    # All tests compile the same line, which torch does eight times in a process.
    torch.compiler.reset()


def _compiled(approximate: str = "none", backend: str = "aot_eager"):
    return torch.compile(lambda x: gelu(x, approximate), backend=backend, fullgraph=True)


def _exact_derivative(x: Tensor) -> Tensor:
    x = x.double()
    return torch.special.ndtr(x) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_right_in_float32_wherever_it_is_computed(backend: str) -> None:
    need_to_know_the_compiler()
    x = torch.cat((torch.linspace(-12, 12, 200_001), FAR))
    with torch.no_grad():
        out = _compiled(backend=backend)(x)
    assert not torch.equal(out, F.gelu(x))
    assert ((out - F.gelu(x.double())).abs() <= 5e-7 + 1e-7 * x.double().abs()).all()
    assert torch.equal(out[x > 6.1], x[x > 6.1])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_its_gradient_in_float32(backend: str) -> None:
    need_to_know_the_compiler()
    x = torch.cat((torch.linspace(-12, 12, 200_001), FAR)).requires_grad_()
    grad = torch.randn(len(x))
    out = _compiled(backend=backend)(x)
    assert not torch.equal(out, F.gelu(x))
    out.backward(grad)
    assert x.grad is not None
    assert ((x.grad - grad.double() * _exact_derivative(x.detach())).abs() <= 1.5e-6 * grad.abs()).all()


def test_several_in_one_graph_of_dynamic_sizes() -> None:
    need_to_know_the_compiler()
    x = torch.randn(7, 5, requires_grad=True)
    out = torch.compile(lambda x: gelu(gelu(x)), backend="aot_eager", fullgraph=True, dynamic=True)(x)
    exact = F.gelu(F.gelu(x))
    assert not torch.equal(out, exact)
    torch.testing.assert_close(out, exact)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x), torch.autograd.grad(exact.sum(), x))


def test_the_polynomial_is_as_close_as_it_says() -> None:
    x = torch.linspace(-14, 14, 100_001, dtype=torch.float64)
    t = x.abs()
    assert (_by_tail(x) - F.gelu(x)).abs().max() < 6e-8
    assert (_derivative(x) - _exact_derivative(x)).abs().max() < 6e-7
    # One function and its derivative, not two that are close.
    x.requires_grad_()
    (slope,) = torch.autograd.grad(_by_tail(x).sum(), x)
    assert (_derivative(x) - slope)[t > 0].abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_are_computed_in_float32(dtype: torch.dtype) -> None:
    x = (3 * torch.randn(1000)).to(dtype).requires_grad_()
    out = _compiled()(x)
    (grad,) = torch.autograd.grad(out.sum(), x)
    for got, exact in ((out, F.gelu(x.detach().double())), (grad, _exact_derivative(x.detach()))):
        assert got.dtype == dtype
        torch.testing.assert_close(got, exact.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=3e-6)


@pytest.mark.parametrize("function", [_by_tail, _derivative])
def test_little_is_written_out_where_every_reader_writes_its_operands_out(function: Callable[[Tensor], Tensor]) -> None:
    # So torch's compiler reads them: a product of the polynomial with itself doubles what it writes.
    written: dict[torch.fx.Node, int] = {}
    for node in make_fx(function)(torch.randn(4)).graph.nodes:
        written[node] = 1 + sum(written[x] for x in node.args if isinstance(x, torch.fx.Node))
    assert max(written.values()) < 300


def test_it_gives_no_subnormal_numbers() -> None:
    x = torch.linspace(-40, 40, 100_001)
    tail = F.relu(x) - _by_tail(x)
    assert (tail[tail != 0].abs() >= torch.finfo(torch.float32).tiny).all()


def test_nan_stays_nan() -> None:
    x = torch.tensor([math.nan, 1.0], requires_grad=True)
    out = _compiled()(x)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert out.isnan().tolist() == grad.isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("dtype", "approximate"), [(torch.float64, "none"), (torch.bfloat16, "tanh"), (torch.float32, "tanh")], ids=str
)
@pytest.mark.parametrize("training", [False, True])
def test_torchs_own_for_other_dtypes_and_tanh(dtype: torch.dtype, approximate: str, training: bool) -> None:
    x = torch.randn(7, 5).to(dtype).requires_grad_(training)
    with torch.set_grad_enabled(training):
        assert torch.equal(_compiled(approximate, "eager")(x), gelu_reference(x, approximate))


def test_torchs_own_where_no_compiler_reads() -> None:
    x = torch.randn(7, 5, requires_grad=True)
    assert torch.equal(gelu(x), gelu_reference(x))
    with torch.no_grad():
        assert torch.equal(gelu(x), gelu_reference(x))
        exported = torch.export.export(_Gelu(), (x.detach(),))
    assert "gelu" in str(exported.graph)


class _Gelu(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return gelu(x)
