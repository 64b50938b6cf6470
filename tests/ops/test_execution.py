"""What counts as plain execution, and autocast's casts."""

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from allmlp.ops import token_linear
from allmlp.ops.execution import autocast, is_compiled, is_compiled_inference, is_plain_inference, is_plain_training
from tests.compilers import need_to_know_the_compiler


def test_gradients_decide_between_the_two() -> None:
    x = torch.zeros(2, requires_grad=True)
    assert is_plain_training(None, x)
    assert not is_plain_inference()
    with torch.no_grad():
        assert is_plain_inference()
        assert not is_plain_training(x)
    assert not is_plain_training(x.detach())
    assert not is_plain_training(x, torch.zeros(2, device="meta"))


def test_whatever_reads_along_is_not_plain() -> None:
    found = []

    def look(x: Tensor) -> Tensor:
        found.append(is_plain_training(x) or is_plain_inference())
        return x.sum()

    x = torch.zeros(2, requires_grad=True)
    torch.func.grad(look)(x)
    with torch.no_grad(), forward_ad.dual_level():
        look(x)
    torch.fx.symbolic_trace(look)
    assert found == [False, False, False]


def test_what_a_compiler_makes_runs_here_unless_it_is_exported_or_transformed() -> None:
    need_to_know_the_compiler()
    found = []

    class Look(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            found.append((is_compiled(), is_compiled_inference()))
            return x.sin()

    x = torch.zeros(2, 2)
    Look()(x)
    torch.compile(Look(), backend="eager")(x)
    with torch.no_grad():
        torch.compile(Look(), backend="eager")(x)
        torch.compile(torch.func.vmap(Look()), backend="eager")(x)
        torch.export.export(Look(), (x,))
    assert found == [(False, False), (True, False), (True, True), (False, False), (False, False)]


# torch itself scripts its decompositions for forward derivatives.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_forward_mode_differentiates_token_mixing() -> None:
    x, tangent, weight = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.randn(5, 3, requires_grad=True)
    with forward_ad.dual_level():
        y = token_linear(forward_ad.make_dual(x, tangent), weight, torch.zeros(5))
        found = forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(found, token_linear(tangent, weight, torch.zeros(5)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_for_torchs_products(dtype: torch.dtype) -> None:
    x, exact, weight = torch.zeros(2), torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=dtype)
    assert autocast(x, None, weight) == (x, None, weight)
    with torch.autocast("cpu", dtype):
        cast = autocast(x, None, exact, weight)
    assert [t if t is None else t.dtype for t in cast] == [dtype, None, torch.float64, dtype]
