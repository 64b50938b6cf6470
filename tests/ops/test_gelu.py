"""The GELU by a rational function, in compiled inference, against the error function."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from allmlp.ops import gelu, gelu_reference
from allmlp.ops.gelu import _central_distribution
from tests.compilers import need_to_know_the_compiler

pytestmark = pytest.mark.usefixtures("unchecked")


def _compiled(approximate: str = "none", backend: str = "aot_eager"):
    return torch.compile(lambda x: gelu(x, approximate), backend=backend, fullgraph=True)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_right_in_float32_wherever_it_is_computed(backend: str) -> None:
    need_to_know_the_compiler()
    x = torch.cat((torch.linspace(-12, 12, 200_001), torch.tensor([-1e30, -1e4, -0.0, 1e-30, 1e4, 1e30])))
    with torch.no_grad():
        out = _compiled(backend=backend)(x)
    assert not torch.equal(out, F.gelu(x))
    error = (out - F.gelu(x.double())).abs()
    assert (error <= 1.5e-6 + 1e-7 * x.double().abs()).all()
    assert (error[x.abs() < 1] < 2e-7).all()
    assert torch.equal(out[x > 6.1], x[x > 6.1])
    assert not out[x < -6.1].any()


def test_the_rational_function_is_as_close_as_it_says() -> None:
    x = torch.linspace(-12, 12, 100_001, dtype=torch.float64)
    error = (x * (_central_distribution(x) - (torch.special.ndtr(x) - 0.5))).abs()
    assert error[x.abs() <= 5.6].max() < 3e-8
    assert error.max() < 6e-8


def test_odd_part_and_special_numbers() -> None:
    x = torch.linspace(0, 8, 10_001)
    with torch.no_grad():
        compiled = _compiled()
        torch.testing.assert_close(compiled(x) - compiled(-x), x, rtol=1e-6, atol=0)
        special = compiled(torch.tensor([0.0, math.inf, -math.inf, math.nan]))
    # x Φ(x) as the equation has it; torch's AVX-512 kernel gives NaN at infinity.
    assert special[:2].tolist() == [0.0, math.inf]
    assert special[2:].isnan().all()


@pytest.mark.parametrize(
    ("dtype", "approximate"), [(torch.float64, "none"), (torch.bfloat16, "none"), (torch.float32, "tanh")], ids=str
)
def test_torchs_own_for_other_dtypes_and_tanh(dtype: torch.dtype, approximate: str) -> None:
    x = torch.randn(7, 5).to(dtype)
    with torch.no_grad():
        assert torch.equal(_compiled(approximate, "eager")(x), gelu_reference(x, approximate))


def test_torchs_own_where_something_is_kept_for_backward_or_no_compiler_reads() -> None:
    x = torch.randn(7, 5, requires_grad=True)
    out = _compiled("none", "eager")(x)
    assert torch.equal(out, gelu_reference(x))
    with torch.no_grad():
        assert torch.equal(gelu(x), gelu_reference(x))
        exported = torch.export.export(_Gelu(), (x.detach(),))
    assert "gelu" in str(exported.graph)


class _Gelu(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return gelu(x)
