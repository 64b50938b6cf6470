"""The linear map across tokens against its equation."""

import pytest
import torch

from allmlp.ops import token_linear, token_linear_reference
from tests.compilers import need_to_know_the_compiler
from tests.tolerances import assert_close


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("batch", "read", "written", "channels"), [(1, 1, 1, 1), (3, 5, 7, 11), (2, 9, 4, 1)])
def test_output_and_gradients(batch: int, read: int, written: int, channels: int, dtype: torch.dtype) -> None:
    leaves = [torch.randn(batch, read, channels), torch.randn(written, read), torch.randn(written)]
    exact = [x.to(dtype).double().requires_grad_() for x in leaves]
    given = [x.to(dtype).requires_grad_() for x in leaves]
    expected, out = token_linear_reference(*exact), token_linear(*given)
    assert out.dtype == dtype
    assert_close(out, expected)
    upstream = torch.randn(expected.shape).to(dtype)
    expected_grads = torch.autograd.grad(expected, exact, upstream.double())
    for grad, expected_grad in zip(torch.autograd.grad(out, given, upstream), expected_grads, strict=True):
        scale = expected_grad.abs().max().clamp_min(1)
        assert_close(grad / scale.to(dtype), expected_grad / scale)


def test_one_bias_for_all_tokens() -> None:
    x, weight = torch.randn(2, 3, 4), torch.randn(5, 3)
    assert torch.equal(token_linear(x, weight, torch.ones(1)), token_linear(x, weight, torch.ones(5)))


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
