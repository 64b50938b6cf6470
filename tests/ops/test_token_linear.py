"""The linear map across tokens against its equation."""

import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from allmlp.ops import token_linear, token_linear_reference
from tests.compilers import need_to_know_the_compiler
from tests.tolerances import assert_close

_module = sys.modules[token_linear.__module__]


@pytest.fixture
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Causal products go block by block from four tokens on, from eight on in larger blocks."""
    for name, value in (("_BLOCK", 2), ("_LONG", 4), ("_VERY_LONG", 8)):
        monkeypatch.setattr(_module, name, value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("batch", "read", "written", "channels"), [(1, 1, 1, 1), (3, 5, 7, 11), (2, 9, 4, 1)])
def test_output_and_gradients(
    short_blocks: None, batch: int, read: int, written: int, channels: int, causal: bool, dtype: torch.dtype
) -> None:
    leaves = [torch.randn(batch, read, channels), torch.randn(written, read), torch.randn(written)]
    exact = [x.to(dtype).double().requires_grad_() for x in leaves]
    given = [x.to(dtype).requires_grad_() for x in leaves]
    expected, out = token_linear_reference(*exact, causal=causal), token_linear(*given, causal=causal)
    assert out.dtype == dtype
    assert_close(out, expected)
    with torch.no_grad():
        assert_close(token_linear(*given, causal=causal), expected)
    upstream = torch.randn(expected.shape).to(dtype)
    expected_grads = torch.autograd.grad(expected, exact, upstream.double())
    for grad, expected_grad in zip(torch.autograd.grad(out, given, upstream), expected_grads, strict=True):
        scale = expected_grad.abs().max().clamp_min(1)
        assert_close(grad / scale.to(dtype), expected_grad / scale)


@pytest.mark.parametrize("tokens", [3, 4, 7, 9, 16])
def test_causal_products_block_by_block(short_blocks: None, tokens: int) -> None:
    x, weight, bias = (torch.randn(size, dtype=torch.float64) for size in ((2, tokens, 3), (tokens, tokens), (tokens,)))
    # Nobody may read what stands above the diagonal.
    weight = weight.tril() + torch.full_like(weight, torch.nan).triu(1)
    leaves = [leaf.requires_grad_() for leaf in (x, weight, bias)]
    out = token_linear(*leaves, causal=True)
    torch.testing.assert_close(out, token_linear_reference(x, weight.nan_to_num(0), bias))
    out.sum().backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)
    assert weight.grad is not None
    assert torch.equal(weight.grad, weight.grad.tril())
    given = x.detach().requires_grad_(), weight.detach().nan_to_num(0).requires_grad_(), bias.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda *leaves: token_linear(*leaves, causal=True), given)
    assert torch.autograd.gradgradcheck(lambda *leaves: token_linear(*leaves, causal=True), given)


def test_long_causal_products_leave_half_of_the_work_out() -> None:
    x, weight = torch.randn(1, 2048, 8), torch.randn(2048, 2048, requires_grad=True)
    work = []
    for causal in (False, True):
        with FlopCounterMode(display=False) as counter:
            token_linear(x, weight, torch.ones(1), causal=causal).sum().backward()
        work.append(counter.get_total_flops())
    assert 0.5 <= work[1] / work[0] < 0.6


def test_one_bias_for_all_tokens(short_blocks: None) -> None:
    x, weight = torch.randn(2, 3, 4), torch.randn(5, 3)
    assert torch.equal(token_linear(x, weight, torch.ones(1)), token_linear(x, weight, torch.ones(5)))
    x, weight = torch.randn(2, 5, 4), torch.randn(5, 5)
    one, each = (token_linear(x, weight, torch.ones(size), causal=True) for size in (1, 5))
    assert torch.equal(one, each)


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_inference(unchecked: None, autocast: bool) -> None:
    x, weight, bias = torch.randn(2, 3, 4), torch.randn(5, 3), torch.randn(5)
    compiled = torch.compile(lambda x: token_linear(x, weight, bias), backend="aot_eager", fullgraph=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = compiled(x)
        assert out.dtype == (torch.bfloat16 if autocast else torch.float32)
        assert_close(out, token_linear_reference(x, weight, bias))


def test_a_compiler_adds_the_bias_behind_the_product(unchecked: None) -> None:
    need_to_know_the_compiler()
    x, weight, bias = torch.randn(2, 3, 4), torch.randn(5, 3), torch.randn(5)
    called: list[object] = []

    def look(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        called.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    with torch.no_grad():
        torch.compile(lambda x: token_linear(x, weight, bias), backend=look, fullgraph=True)(x)
    assert torch.bmm in called
    assert torch.baddbmm not in called
