"""The linear map and its GELU against torch's two calls, and when oneDNN's epilogue takes their place."""

import importlib
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from allmlp.ops import linear, linear_onto, linear_onto_reference, linear_reference
from allmlp.ops.linear import _MULTIPLIES_BFLOAT16, linear_weight_gradient
from tests.compilers import need_to_know_the_compiler
from tests.tolerances import assert_close

multiplies_bfloat16 = pytest.mark.skipif(
    not _MULTIPLIES_BFLOAT16, reason="this processor or this torch has no products in bfloat16"
)


def _drawn(dtype: torch.dtype, *batch: int, bias: bool = True) -> list[Tensor | None]:
    x, weight, offset = torch.randn(*batch, 24), torch.randn(40, 24) / 5, torch.randn(40)
    return [t if t is None else t.to(dtype) for t in (x, weight, offset if bias else None)]


class _Map(torch.nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, "none")


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What every call of oneDNN's product had in its epilogue."""
    found: list[str] = []
    operator = torch.ops.mkldnn._linear_pointwise

    def recorded(x: Tensor, weight: Tensor, bias: Tensor | None, after: str, *rest: object) -> Tensor:
        found.append(after)
        return operator(x, weight, bias, after, *rest)

    def recorded_binary(*given: Any) -> Tensor:
        found.append(given[-1])
        return operator.binary(*given)

    recorded.binary = recorded_binary  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", recorded)
    return found


@pytest.mark.parametrize("gelu", [None, "none", "tanh"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [(), (1,), (7,), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_against_two_calls(dtype: torch.dtype, batch: tuple[int, ...], bias: bool, gelu: str | None) -> None:
    given = _drawn(dtype, *batch, bias=bias)
    exact = [t if t is None else t.double() for t in given]
    with torch.no_grad():
        out = linear(*given, gelu)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert_close(out, linear_reference(*exact, gelu))
    assert_close(linear(*given, gelu), linear_reference(*exact, gelu))


@multiplies_bfloat16
def test_strided_operands_in_bfloat16(stored: list[str]) -> None:
    x, weight, bias = _drawn(torch.bfloat16, 6, 5)
    with torch.no_grad():
        out = linear(x.transpose(0, 1), weight.t().contiguous().t(), bias, "none")
        half = linear(torch.cat((x, x), -1)[..., :24], weight, bias)
    assert stored == ["gelu", "none"]
    assert_close(out, linear_reference(x.transpose(0, 1).double(), weight.double(), bias.double(), "none"))
    assert_close(half, linear_reference(x.double(), weight.double(), bias.double()))


@multiplies_bfloat16
def test_no_samples(stored: list[str]) -> None:
    with torch.no_grad():
        assert linear(*_drawn(torch.bfloat16, 0), "none").shape == (0, 40)
    assert not stored


@multiplies_bfloat16
def test_under_autocast(stored: list[str]) -> None:
    given = _drawn(torch.float32, 7)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = linear(*given, "none")
    assert stored == ["gelu"]
    assert out.dtype == torch.bfloat16
    assert_close(out, linear_reference(*given, "none"))


@multiplies_bfloat16
@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN:UserWarning")
def test_torchs_own_operators_where_they_are_expected(stored: list[str], unchecked: None) -> None:
    x, weight, bias = _drawn(torch.bfloat16, 7)
    linear(x, weight.requires_grad_(), bias, "none").sum().backward()
    weight.requires_grad_(False)
    with torch.no_grad():
        with FlopCounterMode(display=False) as flops:
            linear(x, weight, bias)
        assert flops.get_total_flops() == 2 * 7 * 24 * 40
        torch.func.vmap(lambda row: linear(row, weight, bias))(x)
        with torch.backends.mkldnn.flags(enabled=False):
            linear(x, weight, bias)
        mapped_rows = torch.compile(torch.func.vmap(lambda row: linear(row, weight, bias)), backend="eager")
        mapped_rows(x)
        exported = torch.export.export(_Map(weight, bias), (x,))
        assert "allmlp" not in str(exported.graph)
        exported.module()(x)
        linear(x.float(), weight.float(), bias.float())
    compiled = torch.compile(_Map(weight, bias), backend="eager", fullgraph=True)
    # A compiled model's GELU is one of its own (`ops.gelu`).
    torch.testing.assert_close(compiled(x), F.gelu(F.linear(x, weight, bias)))
    assert not stored


@multiplies_bfloat16
@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN:UserWarning")
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled(stored: list[str], unchecked: None, autocast: bool) -> None:
    x, weight, bias = _drawn(torch.float32 if autocast else torch.bfloat16, 2, 7)
    compiled = torch.compile(_Map(weight, bias), backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out, longer = compiled(x), compiled(torch.cat((x, x)))
        assert stored == ["gelu", "gelu"]
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, linear(x, weight, bias, "none"))
        assert torch.equal(longer, torch.cat((out, out)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gelu", [None, "none", "tanh"])
def test_compiled_in_float32(unchecked: None, gelu: str | None, bias: bool) -> None:
    x, weight, offset = _drawn(torch.float32, 2, 7, bias=bias)
    compiled = torch.compile(lambda x: linear(x, weight, offset, gelu), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(x), linear_reference(x, weight, offset, gelu))


@pytest.mark.parametrize(("gelu", "apart"), [("none", True), (None, False)])
def test_a_compiler_adds_the_bias_in_the_activation(unchecked: None, gelu: str | None, apart: bool) -> None:
    need_to_know_the_compiler()
    x, weight, bias = _drawn(torch.float32, 2, 7)
    given: list[int] = []

    def look(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        given.extend(len(node.args) for node in graph.graph.nodes if node.target is F.linear)
        return graph.forward

    with torch.no_grad():
        torch.compile(lambda x: linear(x, weight, bias, gelu), backend=look, fullgraph=True)(x)
    assert given == [2 if apart else 3]


@multiplies_bfloat16
@pytest.mark.parametrize("bias", [True, False])
def test_operator(bias: bool) -> None:
    torch.library.opcheck(torch.ops.allmlp.linear.default, (*_drawn(torch.bfloat16, 2, 7, bias=bias), "tanh"))


@pytest.mark.parametrize("rows", [(1,), (300,), (2, 256), (3, 7, 29)], ids=str)
@pytest.mark.parametrize(("read", "written"), [(768, 384), (770, 385), (384, 768), (768, 383)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gradient_of_the_weight(dtype: torch.dtype, read: int, written: int, rows: tuple[int, ...]) -> None:
    x = torch.randn(*rows, read).to(dtype)
    grad = (torch.randn(*rows, written) / math.prod(rows) ** 0.5).to(dtype)
    weight = torch.zeros(written, read, dtype=torch.float64, requires_grad=True)
    F.linear(x.double(), weight).backward(grad.double())
    found = linear_weight_gradient(grad, x)
    assert found.dtype == dtype
    assert found.is_contiguous()
    assert_close(found, weight.grad)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [(1,), (7,), (2, 3, 5), (0, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_onto_against_two_calls(dtype: torch.dtype, batch: tuple[int, ...], bias: bool) -> None:
    onto = torch.randn(*batch, 40).to(dtype).requires_grad_()
    given = [onto, *_drawn(dtype, *batch, bias=bias)]
    exact = linear_onto_reference(*(t if t is None else t.double() for t in given))
    before = onto.detach().clone()
    with torch.no_grad():
        out = linear_onto(*given)
    assert out.dtype == dtype
    assert torch.equal(onto, before)
    assert_close(out, exact)
    trained = linear_onto(*given)
    assert_close(trained, exact)
    (grad,) = torch.autograd.grad(trained.sum(), onto)
    assert torch.equal(grad, torch.ones_like(onto))


@multiplies_bfloat16
def test_onto_is_added_as_the_product_is_stored(stored: list[str]) -> None:
    given = _drawn(torch.bfloat16, 2, 3)
    onto = torch.randn(2, 3, 40, dtype=torch.bfloat16)
    with torch.no_grad():
        linear_onto(onto, *given)
        assert stored == ["add"]
        # What oneDNN would not read as it is meant is added by torch.
        for other in (onto.float(), onto.transpose(0, 1).contiguous().transpose(0, 1)):
            expected = linear_onto_reference(other.double(), *(t.double() for t in given))
            assert_close(linear_onto(other, *given).bfloat16(), expected)
        assert stored == ["add", "none", "none"]
        with FlopCounterMode(display=False) as counter:
            linear_onto(onto, *given)
        assert counter.get_total_flops() == 2 * 6 * 24 * 40
    linear_onto(onto, *given)
    assert stored == ["add", "none", "none"]


def test_onto_is_added_where_the_product_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    onto, product = torch.randn(2, 3, 40), torch.randn(2, 3, 40)
    expected = onto + product
    monkeypatch.setattr(importlib.import_module("allmlp.ops.linear"), "linear", lambda *given: product)
    with torch.no_grad():
        out = linear_onto(onto, *_drawn(torch.float32, 2, 3))
    assert out is product
    assert torch.equal(out, expected)


def test_onto_under_autocast() -> None:
    given = _drawn(torch.float32, 2, 3)
    for dtype in (torch.float32, torch.bfloat16):
        onto = torch.randn(2, 3, 40, dtype=dtype)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            out, expected = linear_onto(onto, *given), linear_onto_reference(onto, *given)
        assert out.dtype == expected.dtype
        torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
